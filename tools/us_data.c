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
#include "training/corpus_batch.h"
#include "training/shards_write.h"

#include <stdlib.h>
#include <string.h>

static const struct us_opt opts[] = {
    US_OPT_FILE("text", 't', "PATH", "file or folder of text, .jsonl or .json dialogues", .required = true,
                .repeat = true),
    US_OPT_FILE("output", 'o', "FILE", "token shards (.h5) or tokenizer.json to write",
                .writes = US_OPT_WRITES_FILE),
    US_OPT_FILE("tokenizer", 0, "FILE", "tokenizer.json, a model that has one, or - for a record on stdin"),
    US_OPT_INT("train-vocab", 0, "N", "train a vocabulary of N tokens instead of making shards", .min = 266,
               .max = 1048576),
    US_OPT_FILE("prompts", 0, "PATH",
                "prompt file or folder: documents sharing 13 words with one are left out", .repeat = true),
    US_OPT_ENUM("template", 0, "chat|plain|lines", "how dialogues become text", .def = "chat"),
    US_OPT_FLAG("drop-system", 0, "leave the system messages of dialogues out"),
    US_OPT_NUM("heldout", 0, "SHARE", "share of documents held out for evaluation", .def = "0.02", .max = 1),
    US_OPT_INT("threads", 0, "N", "CPU threads; 0 uses every core", .def = "0", .max = 256),
    US_OPT_GROUP("Output"),
    US_OPT_FLAG("dry-run", 0, "count what would be written, write nothing"),
    US_OPT_FLAG("json", 0, "records as JSON lines instead of TSV"),
    US_OPT_COMMON_TALK,
    US_OPT_END,
};

/* A thread that counts words. */
struct counter {
  struct us_decontaminator *filter; /* shares the job's; NULL: no prompts */
  struct us_bpe_trainer *trainer;
};

/* One run: where documents go. */
struct job {
  struct us_tool_run *run;
  struct us_pool *pool;
  struct us_decontaminator *filter;
  struct counter *counters;     /* one a thread; NULL: shards */
  struct us_corpus_batch batch; /* of documents to count */
  char **overlap; /* (overlap_count) by document of the batch: the words that it shares, or NULL */
  size_t overlap_count;
  struct us_shards_writer *writer;
  struct us_progress progress;
  uint64_t bytes, overlaps;
};

static void say_removed(void *arg, const char *source, const char *words) {
  struct job *job = arg;
  us_log_info(job->run->log, "left out %s: shares \"%s\" with a prompt", source, words);
}

static enum us_status begin_counting(size_t n, void *arg, struct us_err *err) {
  struct job *job = arg;
  if (n > job->overlap_count) {
    char **grown = realloc(job->overlap, n * sizeof *grown);
    if (grown == NULL) return us_err_memory(err, "documents", n * sizeof *grown);
    job->overlap = grown;
    job->overlap_count = n;
  }
  memset(job->overlap, 0, n * sizeof *job->overlap);
  return US_OK;
}

static enum us_status count_words(const struct us_document *document, size_t index, int worker, void *arg,
                                  struct us_err *err) {
  struct job *job = arg;
  struct counter *counter = &job->counters[worker];
  struct us_buffer words = {0};
  bool overlap = false;
  enum us_status status = US_OK;
  if (counter->filter)
    status = us_decontaminator_check(counter->filter, document->text, document->bytes, &overlap, &words, err);
  if (status == US_OK && overlap) {
    job->overlap[index] = words.data;
    return US_OK;
  }
  us_buffer_release(&words);
  return status == US_OK ? us_bpe_trainer_add(counter->trainer, document->text, document->bytes, err)
                         : status;
}

static enum us_status counted(const struct us_document *document, size_t index, void *arg,
                              struct us_err *err) {
  struct job *job = arg;
  (void)err;
  if (job->overlap[index]) say_removed(job, document->source, job->overlap[index]);
  job->overlaps += job->overlap[index] != NULL;
  free(job->overlap[index]);
  job->overlap[index] = NULL;
  return US_OK;
}

static enum us_status take(const struct us_document *document, void *arg, struct us_err *err) {
  struct job *job = arg;
  if (us_tool_interrupted()) return us_err_set(err, US_INTERRUPTED, "interrupted");
  job->bytes += document->bytes;
  us_progress_set(&job->progress, job->bytes);
  return job->counters ? us_corpus_batch_take(document, &job->batch, err)
                       : us_shards_writer_take(document, job->writer, err);
}

static enum us_status read_all(struct job *job, struct us_err *err) {
  struct us_opts *o = job->run->opts;
  struct us_corpus_options options = {.template = (enum us_template)us_opt_choice(o, "template"),
                                      .drop_system = us_opt_flag(o, "drop-system")};
  enum us_status status = US_OK;
  us_progress_start(&job->progress, job->run->quiet ? NULL : stderr, "reading", "B", 0);
  for (size_t i = 0; i < us_opt_count(o, "text") && status == US_OK; i++)
    status = us_corpus_read(us_opt_nth(o, "text", i), &options, take, job, err);
  if (status == US_OK)
    status =
        job->counters ? us_corpus_batch_flush(&job->batch, err) : us_shards_writer_flush(job->writer, err);
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

static enum us_status make_counters(struct job *job, struct us_err *err) {
  int n = us_pool_threads(job->pool);
  job->counters = calloc((size_t)n, sizeof *job->counters);
  if (job->counters == NULL) return us_err_memory(err, "threads", (size_t)n * sizeof *job->counters);
  us_corpus_batch_init(&job->batch, job->pool, begin_counting, count_words, counted, job);
  enum us_status status = US_OK;
  for (int i = 0; i < n && status == US_OK; i++) {
    status = us_bpe_trainer_create(&job->counters[i].trainer, err);
    if (status == US_OK && job->filter)
      status = us_decontaminator_share(job->filter, &job->counters[i].filter, err);
  }
  return status;
}

static void free_counters(struct job *job) {
  for (int i = 0; job->counters && i < us_pool_threads(job->pool); i++) {
    us_bpe_trainer_free(job->counters[i].trainer);
    us_decontaminator_free(job->counters[i].filter);
  }
  for (size_t i = 0; i < job->overlap_count; i++) free(job->overlap[i]);
  us_corpus_batch_release(&job->batch);
  free(job->counters), free(job->overlap);
}

static enum us_status make_vocabulary(struct job *job, struct us_err *err) {
  struct us_opts *o = job->run->opts;
  struct us_buffer json = {0};
  enum us_status status = make_counters(job, err);
  if (status == US_OK) status = read_all(job, err);
  for (int i = 1; i < us_pool_threads(job->pool) && status == US_OK; i++)
    status = us_bpe_trainer_join(job->counters[0].trainer, job->counters[i].trainer, err);
  if (status == US_OK)
    status =
        us_bpe_trainer_finish(job->counters[0].trainer, (int32_t)us_opt_int(o, "train-vocab"), &json, err);
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
  free_counters(job);
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
  char name[US_TOKENIZER_NAME_MAX];
  if (us_opt_str(o, "tokenizer") == NULL)
    return us_err_set(err, US_ERR_USAGE, "--tokenizer is required, or --train-vocab");
  enum us_status status = us_record_resolve(us_opt_str(o, "tokenizer"), stdin, NULL, &record, err);
  if (status == US_OK) status = us_tokenizer_file_read(record.path, &json, err);
  if (status == US_OK) us_tokenizer_file_name(record.path, name);
  if (status == US_OK) status = us_tokenizer_parse(json.data, json.size, name, &tokenizer, err);
  if (status == US_OK)
    status = us_shards_writer_create(tokenizer, json.data, us_opt_num(o, "heldout"), &job->writer, err);
  if (status == US_OK) {
    us_shards_writer_filter(job->writer, job->filter, say_removed, job);
    us_shards_writer_threads(job->writer, job->pool);
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
  enum us_status status = us_tool_check_outputs(tool_run, err);
  if (status == US_OK) status = us_pool_create((int)us_opt_int(o, "threads"), &job.pool, err);
  if (status == US_OK) status = open_filter(o, &job.filter, err);
  if (status == US_OK)
    status = us_opt_given(o, "train-vocab") ? make_vocabulary(&job, err) : make_shards(&job, err);
  us_decontaminator_free(job.filter);
  us_pool_free(job.pool);
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
                   "Of a folder, and those in it, files of text and source code are read by their names "
                   "(.txt, .md, .py, .c, "
                   ".html, ...), and .jsonl and .json; others are passed over.\n\n"
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
