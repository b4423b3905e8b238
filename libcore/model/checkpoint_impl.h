/* checkpoint_impl.h: what checkpoint.c, checkpoint_hf.c and checkpoint_h5.c share. Private to libcore/model. */
#ifndef US_MODEL_CHECKPOINT_IMPL_H
#define US_MODEL_CHECKPOINT_IMPL_H

#include "model/bind.h"
#include "model/checkpoint.h"
#include <jansson.h>

#define US_MAX_TOKENIZER_BYTES ((size_t)256 << 20)

/* Published names inside a folder. */
#define US_CONFIG_FILE     "config.json"
#define US_GENERATION_FILE "generation_config.json"
#define US_TOKENIZER_FILE  "tokenizer.json"
#define US_PROVENANCE_FILE "provenance.json"
#define US_MASK_FILE       "mask_embedding.pt"

US_CHECKED enum us_status us_checkpoint_try_folder(const char *path, struct us_err *err);
US_CHECKED enum us_status us_model_open_folder(const char *path, struct us_model **ret_model,
                                               struct us_err *err);
US_CHECKED enum us_status us_model_open_h5(const char *path, struct us_model **ret_model, struct us_err *err);
US_CHECKED enum us_status us_draft_open_folder(const char *path, struct us_draft **ret_draft,
                                               struct us_err *err);
US_CHECKED enum us_status us_draft_open_h5(const char *path, struct us_draft **ret_draft, struct us_err *err);

US_CHECKED enum us_status us_model_write_h5(const char *path, struct us_model *model,
                                            const char *opt_provenance, struct us_err *err);
US_CHECKED enum us_status us_draft_write_h5(const char *path, struct us_draft *draft,
                                            const char *opt_provenance, struct us_err *err);
US_CHECKED enum us_status us_draft_write_folder(const char *path, struct us_draft *draft,
                                                const char *opt_provenance, struct us_err *err);

/* Bind everything, note what was left over, and release the store. */
US_CHECKED enum us_status us_model_bind(struct us_model *model, struct us_store *store, struct us_err *err);

/* The same for a drafter; the vector "mask_embedding" is bound only if bind_mask is set. */
US_CHECKED enum us_status us_draft_bind(struct us_draft *draft, struct us_store *store, bool bind_mask,
                                        struct us_err *err);

/* The config.json of a model with its scale rule in it; json_decref it. */
US_CHECKED enum us_status us_model_config_json(struct us_model *model, json_t **ret_root, struct us_err *err);

/* Read the scale rule back from a config.json; "" where it has none. */
void us_model_config_scale_rule(struct us_model *model, const json_t *config);

/* US_ERR_USAGE naming the first matrix without data. */
US_CHECKED enum us_status us_refs_check_data(const struct us_tensor_ref *refs, size_t count,
                                             struct us_err *err);

#endif
