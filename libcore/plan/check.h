/* check.h: proof that a tile program can neither hang nor race, and that it computes everything once.
 *
 *     if (us_program_check(program, &err) != US_OK) ...    // "task 812 (expert_down, layer 3, ...) may race with ..."
 *
 * Deadlock: every event a task waits for is signalled by earlier tasks only; workers claim tasks in order, so the
 * earliest unfinished task can always run. Race: two accesses of overlapping regions, one of them a write, must be
 * ordered through events. Coverage: a tile lies within its operation's; every region read has been written completely, last by the
 * operation of the layer that regions.c names for it; nothing is written twice by one operation; the outputs (logits if there is
 * a head, keys and values of every layer, the last norm) are complete at the end.
 */
#ifndef US_PLAN_CHECK_H
#define US_PLAN_CHECK_H

#include "base/err.h"
#include "plan/program.h"

/* US_ERR_CHECK with the first violation; US_ERR_MEMORY. Time and memory grow with tasks x buffers' tiles. */
US_CHECKED enum us_status us_program_check(const struct us_program *program, struct us_err *err);

#endif
