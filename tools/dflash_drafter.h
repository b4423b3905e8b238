/* dflash_drafter.h: the drafter that dflash-train makes: its shape and formats by options or by --init, and its file.
 *
 *     static const struct us_opt opts[] = {..., US_DFLASH_DRAFTER_OPTIONS, US_OPT_END};
 *     struct us_dflash_drafter drafter = {.opts = opts, .target = model, .train = &train};
 *     us_dflash_drafter_init(&drafter, &err);                     // train.shape, init, encoding and head are filled
 *     us_dflash(&train, pool, &err);
 *     us_dflash_drafter_write(&drafter, pool, path, provenance, &err);
 *     us_dflash_drafter_release(&drafter);
 */
#ifndef US_TOOLS_DFLASH_DRAFTER_H
#define US_TOOLS_DFLASH_DRAFTER_H

#include "base/provenance.h"
#include "model/checkpoint.h"
#include "tools/tool.h"
#include "training/dflash.h"

/* clang-format off */
#define US_DFLASH_DRAFTER_OPTIONS \
  US_OPT_GROUP("Drafter"), \
  US_OPT_FILE("init", 0, "FILE", "continue from this drafter; it says the shape"), \
  US_OPT_INT("layers", 0, "L", "layers", .def = "4", .min = 1, .max = US_MAX_DRAFT_LAYERS), \
  US_OPT_INT("block", 0, "B", "anchor and masks a block", .def = "8", .min = 2, .max = US_MAX_BLOCK), \
  US_OPT_INT("window", 0, "W", "positions that a block sees back", .def = "256", .min = 1), \
  US_OPT_STR( \
      "taps", 0, "L,L,...", \
      "target layers whose outputs are the context; default: four over the depth, the last included"), \
  US_OPT_INT("inner", 0, "F", "inner size of the MLP; 0: twice the hidden size", .def = "0"), \
  US_OPT_INT("heads", 0, "H", "query heads", .def = "4", .min = 1, .max = 1024), \
  US_OPT_INT("kv-heads", 0, "G", "key and value heads", .def = "2", .min = 1, .max = 1024), \
  US_OPT_INT("head-dim", 0, "Q", "size of a head; 0: hidden size by heads", .def = "0", .max = 1024), \
  US_OPT_INT("mask-id", 0, "ID", "token id that stands for a mask; -1: the vocabulary's last", .def = "-1", \
             .min = -1), \
  US_OPT_INT("markov", 0, "R", \
             "rank of what a slot's logits get of the token drafted before it; the slots are then chosen one " \
             "after the other; 0: nothing", \
             .def = "0", .max = 4096), \
  US_OPT_FLAG("fixed-mask", 0, "do not train the mask vector"), \
  US_OPT_ENUM("format", 0, "same|bf16|fp8|mxfp4", \
              "of its matrices, trained through the rounding; same: that of --init, or bf16", \
              .def = "same"), \
  US_OPT_ENUM("head", 0, "same|target|bf16|fp8|mxfp4", \
              "output head that it drafts with: the target's, or a copy of it of its own in this format, " \
              "rounded and not trained; same: that of --init, or the target's", \
              .def = "same")
/* clang-format on */

struct us_dflash_drafter {
  struct us_opts *opts;
  struct us_model *target;
  struct us_dflash *train;

  struct us_draft *init, *rounded;          /* rounded: init with another head, when nothing is trained */
  struct us_matrix_encoding encoding, head; /* --format, --head */
};

/* Whether --init is only rounded: without steps and a time. */
bool us_dflash_drafter_only_rounds(struct us_opts *opts);

/* US_ERR_USAGE for options of training where there is none; before anything is opened. */
US_CHECKED enum us_status us_dflash_drafter_check(struct us_opts *opts, struct us_err *err);

/* US_ERR_USAGE for a shape that cannot draft for the target, or options of shape beside --init. */
US_CHECKED enum us_status us_dflash_drafter_init(struct us_dflash_drafter *drafter, struct us_err *err);

/* What whoever reads the drafter must know, into its provenance. */
US_CHECKED enum us_status us_dflash_drafter_conventions(const struct us_draft_shape *shape,
                                                        struct us_provenance *provenance, struct us_err *err);

/* What was trained, or --init rounded. */
US_CHECKED enum us_status us_dflash_drafter_write(struct us_dflash_drafter *drafter, struct us_pool *pool,
                                                  const char *path, const char *provenance,
                                                  struct us_err *err);
void us_dflash_drafter_release(struct us_dflash_drafter *drafter);

#endif
