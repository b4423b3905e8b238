/* train_parity.c: training on a GPU against training on the CPU, from the same masters: losses and every gradient.
 *
 * Usage: train_parity [CASE...], of tiny, tiny-pro, pico; train_parity speed SHAPE [LAYERS [ROWS [LENGTH]]].
 * Exit 0, 1, 5, 77. The bound stands in train_parity.h.
 */
#include "train_parity.h"

#include <signal.h>

static void run_case(const char *name, struct us_cuda *cuda) {
  struct target t = open_target(name, cuda);
  size_t doubtful = open_executors(&t);
  record(name, "every choice of experts has its margin", t.rows.R, doubtful, "");
  check_target(&t);
  check_drafter(&t);
  check_refusals(&t);
  close_target(&t);
}

int main(int count, char **arguments) {
  static const char *const names[] = {"tiny", "tiny-pro", "pico"};
  struct us_err err = {0};
  struct us_cuda *cuda;
  signal(SIGALRM, hung);
  alarm(280);
  if (count > 1 && strcmp(arguments[1], "speed") == 0) return lab_speed(count - 2, arguments + 2);
  need(us_cuda_open(0, &cuda, &err), &err, "GPU");
  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
    bool wanted = count < 2;
    for (int j = 1; j < count; j++) wanted |= strcmp(arguments[j], names[i]) == 0;
    if (wanted) run_case(names[i], cuda);
  }
  us_cuda_close(cuda);
  return any_failed ? 1 : 0;
}
