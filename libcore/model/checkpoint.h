/* checkpoint.h: models and drafters on disk: Hugging Face folders as published, and the toolkit's HDF5 files.
 *
 *     us_model_open("MiMo-V2.5-Pro-FP4-DFlash", &model, &err);    // folder: config.json, *.safetensors, tokenizer.json
 *     us_model_write("q.h5", model, provenance_json, &err);       // .h5, or a folder to be created
 *
 * Everything read is checked before it is believed: names, dtypes and shapes against the config, offsets against the
 * file, small vectors for NaN and Inf. A bad file is US_ERR_INPUT with a message that names file and field.
 */
#ifndef US_MODEL_CHECKPOINT_H
#define US_MODEL_CHECKPOINT_H

#include "model/model.h"

US_CHECKED enum us_status us_model_open(const char *path, struct us_model **ret_model, struct us_err *err);
US_CHECKED enum us_status us_draft_open(const char *path, struct us_draft **ret_draft, struct us_err *err);

/* Write atomically: a path ending in .h5 becomes one HDF5 artefact; any other path a folder in the published layout
 * (config.json, model.safetensors or shards with an index of at most shard_bytes each, tokenizer.json). */
US_CHECKED enum us_status us_model_write(const char *path, struct us_model *model, const char *provenance_json,
                                         struct us_err *err);
US_CHECKED enum us_status us_draft_write(const char *path, struct us_draft *draft, const char *provenance_json,
                                         struct us_err *err);

/* Touch and check every weight: NaN and Inf codes, scale byte 255. US_ERR_INPUT names file, tensor and block. */
US_CHECKED enum us_status us_model_check(const struct us_model *model, struct us_err *err);

#endif
