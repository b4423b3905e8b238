/* checkpoint.h: models and drafters on disk: Hugging Face folders as published, and the toolkit's HDF5 files.
 *
 *     us_model_open("MiMo-V2.5-Pro-FP4-DFlash", &model, &err);    // folder: config.json, *.safetensors, tokenizer.json
 *     us_draft_open("MiMo-V2.5-Pro-FP4-DFlash", &draft, &err);    // its dflash/ folder
 *     if (us_draft_check_target(draft, model, &err) != US_OK) ...
 *     us_model_write("q.h5", model, provenance_json, &err);       // .h5, or a folder to be created
 *
 * Everything read is checked before it is believed: names, dtypes and shapes against the config, offsets against the
 * file, small vectors for NaN and Inf. A bad file is US_ERR_INPUT with a message that names file and field.
 * Opening maps: matrices point into the file, and no weight is read before it is used. docs/formats.md has the layouts.
 */
#ifndef US_MODEL_CHECKPOINT_H
#define US_MODEL_CHECKPOINT_H

#include "model/model.h"

#define US_SHARD_BYTES 5000000000ull /* of a folder's safetensors files, as others cut them */

/* Open a model or drafter: an HDF5 file (any file name but a folder's), or a folder. A drafter is also found in the
 * folder `dflash` of a model's folder. What was skipped (MTP tensors) is said in ->notes; nothing is printed.
 * A folder's eos ids are those of generation_config.json, if it has one. */
US_CHECKED enum us_status us_model_open(const char *path, struct us_model **ret_model, struct us_err *err);
US_CHECKED enum us_status us_draft_open(const char *path, struct us_draft **ret_draft, struct us_err *err);

/* Write atomically: a path ending in .h5 becomes one HDF5 artefact; any other path a folder in the published layout
 * (config.json, model.safetensors or shards with an index of at most US_SHARD_BYTES each, tokenizer.json,
 * provenance.json), which must not exist or be empty. Weights are stored bit for bit; small vectors exactly (a folder has
 * them in BF16 where that loses nothing). A folder's mask_embedding.pt holds BF16.
 * model->shape.precision, and draft->shape.head, are brought up to date with the matrices. A NULL provenance writes none. */
US_CHECKED enum us_status us_model_write(const char *path, struct us_model *model,
                                         const char *opt_provenance_json, struct us_err *err);
US_CHECKED enum us_status us_draft_write(const char *path, struct us_draft *draft,
                                         const char *opt_provenance_json, struct us_err *err);

/* Whether a checkpoint could be written to `path` now; leaves nothing there. US_ERR_IO says why not. */
US_CHECKED enum us_status us_checkpoint_try(const char *path, struct us_err *err);

/* us_model_write to a folder with another shard size; 0: one file. */
US_CHECKED enum us_status us_model_write_folder(const char *path, struct us_model *model,
                                                const char *opt_provenance_json, uint64_t shard_bytes,
                                                struct us_err *err);

/* Touch and check every weight: NaN and Inf values and codes, scale byte 255. US_ERR_INPUT names file, tensor and block. */
US_CHECKED enum us_status us_model_check(const struct us_model *model, struct us_err *err);
US_CHECKED enum us_status us_draft_check(const struct us_draft *draft, struct us_err *err);

/* Whether the drafter was made for such a model: hidden size, number of layers, mask id. US_ERR_INPUT names both files and
 * what differs. */
US_CHECKED enum us_status us_draft_check_target(const struct us_draft *draft, const struct us_model *model,
                                                struct us_err *err);

#endif
