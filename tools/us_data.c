/* us-data: text to token shards, or to a vocabulary. */
#include "base/atomic.h"
#include "base/io.h"
#include "base/progress.h"
#include "base/provenance.h"
#include "base/record.h"
#include "base/table.h"
#include "formats/prompts.h"
#include "model/tokenizer_file.h"
#include "tools/tool.h"
#include "training/bpe_train.h"
#include "training/shards_write.h"

#include <stdlib.h>
#include <string.h>

static const struct us_opt opts[] = {
    US_OPT_FILE("text", 't', "PATH", "file or folder of text, .jsonl or .json dialogues", .required = true,
                .repeat = true),
    US_OPT_FILE("output", 'o', "FILE", "token shards (.h5) or tokenizer.json to write"),
    US_OPT_FILE("tokenizer", 0, "FILE", "tokenizer.json, a model that has one, or - for a record on stdin"),
    US_OPT_INT("train-vocab", 0, "N", "train a vocabulary of N tokens instead of making shards", .min = 266,
               .max = 1048576),
    US_OPT_FILE("prompts", 0, "PATH",
                "prompt file or folder: documents sharing 13 words with one are left out", .repeat = true),
    US_OPT_ENUM("template", 0, "chat|plain|lines", "how dialogues become text", .def = "chat"),
    US_OPT_FLAG("drop-system", 0, "leave the system messages of dialogues out"),
    US_OPT_NUM("heldout", 0, "SHARE", "share of documents held out for evaluation", .def = "0.02", .max = 1),
    US_OPT_GROUP("Output"),
    US_OPT_FLAG("dry-run", 0, "count what would be written, write nothing"),
    US_OPT_FLAG("json", 0, "records as JSON lines instead of TSV"),
    US_OPT_COMMON_TALK,
    US_OPT_END,
};

/* One run: where documents go. */
struct job {
  struct us_tool_run *run;
  struct us_decontaminator *filter;
  struct us_bpe_trainer *trainer; /* NULL: shards */
  struct us_shards_writer *writer;
  struct us_progress progress;
  uint64_t bytes, overlaps;
};

static void say_removed(void *arg, const char *source, const char *words) {
  struct job *job = arg;
  us_log_info(job->run->log, "left out %s: shares \"%s\" with a prompt", source, words);
}

static enum us_status train_on(struct job *job, const struct us_document *document, struct us_err *err) {
  bool overlap = false;
  struct us_buffer words = {0};
  enum us_status status = US_OK;
  if (job->filter)
    status = us_decontaminator_check(job->filter, document->text, document->bytes, &overlap, &words, err);
  if (overlap && status == US_OK) say_removed(job, document->source, words.data);
  job->overlaps += overlap;
  us_buffer_release(&words);
  return overlap || status != US_OK ? status
                                    : us_bpe_trainer_add(job->trainer, document->text, document->bytes, err);
}

static enum us_status take(const struct us_document *document, void *arg, struct us_err *err) {
  struct job *job = arg;
  if (us_tool_interrupted()) return us_err_set(err, US_INTERRUPTED, "interrupted");
  job->bytes += document->bytes;
  us_progress_set(&job->progress, job->bytes);
  return job->trainer ? train_on(job, document, err) : us_shards_writer_take(document, job->writer, err);
}

static enum us_status read_all(struct job *job, struct us_err *err) {
  struct us_opts *o = job->run->opts;
  struct us_corpus_options options = {.template = (enum us_template)us_opt_choice(o, "template"),
                                      .drop_system = us_opt_flag(o, "drop-system")};
  enum us_status status = US_OK;
  us_progress_start(&job->progress, job->run->quiet ? NULL : stderr, "reading", "B", 0);
  for (size_t i = 0; i < us_opt_count(o, "text") && status == US_OK; i++)
    status = us_corpus_read(us_opt_nth(o, "text", i), &options, take, job, err);
  us_progress_end(&job->progress);
  return status;
}

/* A prompt is one text: its turns or messages follow each other. */
static enum us_status add_prompt(struct us_decontaminator *filter, const struct us_prompt *prompt,
                                 struct us_err *err) {
  struct us_buffer text = {0};
  enum us_status status = us_buffer_add(&text, prompt->text ? prompt->text : "", err);
  for (size_t i = 0; i < prompt->n_messages && status == US_OK; i++) {
    const char *content = prompt->messages[i].content;
    status = us_buffer_add(&text, "\n", err);
    if (status == US_OK) status = us_buffer_add(&text, content ? content : "", err);
  }
  if (status == US_OK) status = us_decontaminator_add(filter, text.data, text.size, err);
  us_buffer_release(&text);
  return status;
}

static enum us_status open_filter(struct us_opts *o, struct us_decontaminator **ret_filter,
                                  struct us_err *err) {
  enum us_status status = US_OK;
  if (us_opt_count(o, "prompts") > 0) status = us_decontaminator_create(ret_filter, err);
  for (size_t i = 0; i < us_opt_count(o, "prompts") && status == US_OK; i++) {
    struct us_prompts *prompts;
    if ((status = us_prompts_open_dir(us_opt_nth(o, "prompts", i), &prompts, err)) != US_OK) break;
    for (size_t j = 0; j < prompts->n && status == US_OK; j++)
      status = add_prompt(*ret_filter, &prompts->items[j], err);
    us_prompts_free(prompts);
  }
  return status;
}

static enum us_status write_text(const char *path, const struct us_buffer *text, struct us_err *err) {
  struct us_atomic out;
  enum us_status status = us_atomic_open(path, &out, err);
  if (status != US_OK) return status;
  status = us_io_write_all(out.fd, text->data, text->size, path, err);
  if (status == US_OK) return us_atomic_commit(&out, err);
  us_atomic_abandon(&out);
  return status;
}

static enum us_status make_vocabulary(struct job *job, struct us_err *err) {
  struct us_opts *o = job->run->opts;
  struct us_buffer json = {0};
  enum us_status status = us_bpe_trainer_create(&job->trainer, err);
  if (status == US_OK) status = read_all(job, err);
  if (status == US_OK)
    status = us_bpe_trainer_finish(job->trainer, (int32_t)us_opt_int(o, "train-vocab"), &json, err);
  if (status == US_OK)
    us_log_notice(job->run->log, "%lld tokens from %llu bytes of text, %llu documents left out",
                  (long long)us_opt_int(o, "train-vocab"), (unsigned long long)job->bytes,
                  (unsigned long long)job->overlaps);
  if (status == US_OK && !us_opt_flag(o, "dry-run")) {
    status = write_text(us_opt_str(o, "output"), &json, err);
    if (status == US_OK)
      status =
          us_record_emit(job->run->out, us_opt_flag(o, "json"), us_opt_str(o, "output"), "tokenizer", err);
  }
  us_buffer_release(&json);
  us_bpe_trainer_free(job->trainer);
  return status;
}

/* The dry run's answer: a row a part. */
static enum us_status print_counts(struct us_tool_run *run, const struct us_shards_counts *counts,
                                   struct us_err *err) {
  static const char *const columns[] = {"part",        "documents",  "bytes",   "tokens",
                                        "loss_tokens", "duplicates", "overlaps"};
  static const char *const parts[] = {"train", "heldout"};
  struct us_table *table;
  enum us_status status = us_table_open(run->out, columns, 7, us_opt_flag(run->opts, "json"), &table, err);
  if (status != US_OK) return status;
  for (int part = 0; part < US_N_PARTS; part++) {
    us_table_text(table, parts[part]);
    us_table_int(table, (int64_t)counts->documents[part]);
    us_table_int(table, (int64_t)counts->bytes[part]);
    us_table_int(table, (int64_t)counts->tokens[part]);
    us_table_int(table, (int64_t)counts->loss[part]);
    us_table_int(table, part ? 0 : (int64_t)counts->duplicates);
    us_table_int(table, part ? 0 : (int64_t)counts->overlaps);
  }
  return us_table_close(table, err);
}

static enum us_status make_provenance(struct us_tool_run *run, const char *tokenizer, char **ret_text,
                                      struct us_err *err) {
  struct us_provenance *provenance = NULL;
  char hex[US_SHA256_HEX], *options = us_opts_record(run->opts);
  enum us_status status = options ? US_OK : us_err_memory(err, "options", 0);
  if (status == US_OK)
    status = us_provenance_create(run->name, run->argc, run->argv, options, 0, &provenance, err);
  if (status == US_OK) status = us_sha256_file(tokenizer, hex, err);
  if (status == US_OK) status = us_provenance_add_parent(provenance, tokenizer, hex, "tokenizer", err);
  *ret_text = status == US_OK ? us_provenance_text(provenance, err) : NULL;
  if (status == US_OK && *ret_text == NULL) status = err->status;
  us_provenance_free(provenance);
  free(options);
  return status;
}

static enum us_status write_shards(struct job *job, const char *tokenizer, struct us_err *err) {
  struct us_opts *o = job->run->opts;
  const struct us_shards_counts *counts = us_shards_writer_counts(job->writer);
  bool dry = us_opt_flag(o, "dry-run");
  char *provenance = NULL;
  us_log_notice(
      job->run->log,
      "%llu documents: %llu to train on, %llu held out, %llu duplicates, %llu overlapping with prompts",
      (unsigned long long)counts->read, (unsigned long long)counts->documents[US_PART_TRAIN],
      (unsigned long long)counts->documents[US_PART_HELDOUT], (unsigned long long)counts->duplicates,
      (unsigned long long)counts->overlaps);
  enum us_status status = make_provenance(job->run, tokenizer, &provenance, err);
  if (status == US_OK)
    status = us_shards_writer_finish(job->writer, dry ? NULL : us_opt_str(o, "output"), provenance, err);
  free(provenance);
  if (status != US_OK || dry) return status == US_OK ? print_counts(job->run, counts, err) : status;
  return us_record_emit(job->run->out, us_opt_flag(o, "json"), us_opt_str(o, "output"), "tokens", err);
}

static enum us_status make_shards(struct job *job, struct us_err *err) {
  struct us_opts *o = job->run->opts;
  struct us_record record = {0};
  struct us_buffer json = {0};
  struct us_tokenizer *tokenizer = NULL;
  if (us_opt_str(o, "tokenizer") == NULL)
    return us_err_set(err, US_ERR_USAGE, "--tokenizer is required, or --train-vocab");
  enum us_status status = us_record_resolve(us_opt_str(o, "tokenizer"), stdin, NULL, &record, err);
  if (status == US_OK) status = us_tokenizer_file_read(record.path, &json, err);
  if (status == US_OK) status = us_tokenizer_parse(json.data, json.size, record.path, &tokenizer, err);
  if (status == US_OK)
    status = us_shards_writer_create(tokenizer, json.data, us_opt_num(o, "heldout"), &job->writer, err);
  if (status == US_OK) {
    us_shards_writer_filter(job->writer, job->filter, say_removed, job);
    status = read_all(job, err);
  }
  if (status == US_OK) status = write_shards(job, record.path, err);
  us_shards_writer_free(job->writer);
  us_tokenizer_free(tokenizer);
  us_buffer_release(&json);
  us_record_release(&record);
  return status;
}

static enum us_status run(struct us_tool_run *tool_run, struct us_err *err) {
  struct job job = {.run = tool_run};
  struct us_opts *o = tool_run->opts;
  if (us_opt_str(o, "output") == NULL && !us_opt_flag(o, "dry-run"))
    return us_err_set(err, US_ERR_USAGE, "--output is required, or --dry-run");
  enum us_status status = open_filter(o, &job.filter, err);
  if (status == US_OK)
    status = us_opt_given(o, "train-vocab") ? make_vocabulary(&job, err) : make_shards(&job, err);
  us_decontaminator_free(job.filter);
  return status;
}

static const struct us_tool tool = {
    .name = "us-data",
    .summary = "text to token shards, or to a vocabulary",
    .description = "Reads text files, question and answer lines and dialogues as documents, drops exact "
                   "duplicates and documents that "
                   "share 13 consecutive words with a prompt, tokenises them, and writes token shards: ids, "
                   "document edges and "
                   "loss marks, in a training and a held-out part. A document's part and place follow from "
                   "the hash of its text.\n\n"
                   "JSON lines hold {\"text\"}, {\"question\", \"answer\"}, {\"prompt\", \"response\"} or "
                   "{\"messages\"}; .json files an "
                   "object or a list of objects with \"messages\" or \"traj\". Of questions and dialogues "
                   "only answers and "
                   "assistant turns carry a loss.\n\n"
                   "With --train-vocab a byte-level BPE vocabulary is trained on the same documents and "
                   "written as tokenizer.json.",
    .examples = "# a vocabulary of 4,096 tokens, then shards made with it\n"
                "us-data --text text/ --train-vocab 4096 -o tokenizer.json\n"
                "us-data --text text/ --prompts data/prompts --tokenizer tokenizer.json -o text.h5",
    .opts = opts,
    .run = run,
};

int main(int argc, char **argv) {
  return us_tool_main(&tool, argc, argv);
}
