/* train_opts.c: what the training tools read from their options alike. */
#include "tools/train_opts.h"

void us_tool_read_trainer(struct us_opts *opts, struct us_trainer *r) {
  r->optim = us_optim_default(us_opt_choice(opts, "optimizer") == 0 ? US_OPTIM_MUON : US_OPTIM_ADAMW);
  r->optim.newton = us_opt_choice(opts, "newton") == 0 ? US_NEWTON_SCHULZ5 : US_NEWTON_POLAR_EXPRESS;
  r->optim.adamw_decay = r->optim.muon_decay = us_opt_num(opts, "decay");
  r->schedule = (struct us_schedule){.kind = (enum us_schedule_kind)us_opt_choice(opts, "schedule"),
                                     .peak = us_opt_num(opts, "lr"),
                                     .floor = us_opt_num(opts, "floor"),
                                     .warmup = us_opt_num(opts, "warmup")};
  r->clip = us_opt_num(opts, "clip");
  r->steps = (uint64_t)us_opt_int(opts, "steps");
  r->minutes = us_opt_num(opts, "minutes");
  r->state_path = us_opt_str(opts, "state");
  r->save_every = (uint64_t)us_opt_int(opts, "save-every");
}
