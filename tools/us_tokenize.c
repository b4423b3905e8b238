/* us-tokenize: text on stdin to token ids on stdout, and back. */
#include "formats/tokenizer.h"
#include "model/tokenizer_file.h"
#include "tools/tool.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#define MAX_TEXT ((size_t)1 << 30)

static const struct us_opt opts[] = {
    US_OPT_FILE("tokenizer", 't', "FILE", "tokenizer.json, or a model that has one", .required = true),
    US_OPT_FLAG("decode", 'd', "read ids, write text"),
    US_OPT_FLAG("plain", 0, "encode special tokens in the text as plain text; decode without them"),
    US_OPT_FLAG("pieces", 0, "with each id its bytes, escaped, after a tab"),
    US_OPT_ARG("input", "FILE", "text, or ids separated by white space", .def = "-"),
    US_OPT_COMMON_TALK,
    US_OPT_END,
};

static void print_piece(FILE *out, const char *bytes, size_t n) {
  fputc('\t', out);
  for (size_t i = 0; i < n; i++) {
    unsigned char byte = (unsigned char)bytes[i];
    if (byte == '\\' || byte < 0x20 || byte == 0x7f)
      fprintf(out, "\\x%02x", byte);
    else
      fputc(byte, out);
  }
}

static enum us_status encode(struct us_tool_run *run, const struct us_tokenizer *tokenizer,
                             const struct us_buffer *input, struct us_err *err) {
  struct us_ids ids = {0};
  bool special = !us_opt_flag(run->opts, "plain"), pieces = us_opt_flag(run->opts, "pieces");
  enum us_status status =
      us_tokenizer_encode(tokenizer, input->size ? input->data : "", input->size, special, &ids, err);
  for (size_t i = 0; i < ids.count && status == US_OK; i++) {
    fprintf(run->out, "%d", (int)ids.ids[i]);
    size_t n = 0;
    const char *bytes = us_tokenizer_bytes(tokenizer, ids.ids[i], &n);
    if (pieces) print_piece(run->out, bytes, n);
    fputc('\n', run->out);
  }
  us_ids_release(&ids);
  return status;
}

static enum us_status decode(struct us_tool_run *run, const struct us_tokenizer *tokenizer,
                             const struct us_buffer *input, struct us_err *err) {
  struct us_buffer text = {0};
  bool skip = us_opt_flag(run->opts, "plain");
  enum us_status status = US_OK;
  for (const char *p = input->size ? input->data : ""; status == US_OK;) {
    while (isspace((unsigned char)*p)) p++;
    if (p == input->data + input->size || input->size == 0) break;
    char *end;
    long value = strtol(p, &end, 10);
    if (end == p || (end < input->data + input->size && !isspace((unsigned char)*end)) || value < 0 ||
        value > INT32_MAX) {
      status = us_err_set(err, US_ERR_INPUT, "%s: byte %td: not a token id", us_opt_str(run->opts, "input"),
                          p - input->data);
      break;
    }
    int32_t id = (int32_t)value;
    status = us_tokenizer_decode(tokenizer, &id, 1, skip, &text, err);
    if (status == US_ERR_USAGE)
      status =
          us_err_set(err, US_ERR_INPUT, "%s: no token has id %d", us_opt_str(run->opts, "input"), (int)id);
    p = end;
  }
  if (status == US_OK) fwrite(text.data, 1, text.size, run->out);
  us_buffer_release(&text);
  return status;
}

static enum us_status run(struct us_tool_run *tool_run, struct us_err *err) {
  struct us_tokenizer *tokenizer = NULL;
  struct us_buffer input = {0}, json = {0};
  const char *path = us_opt_str(tool_run->opts, "tokenizer");
  enum us_status status = us_tokenizer_file_read(path, &json, err);
  char name[US_TOKENIZER_NAME_MAX];
  us_tokenizer_file_name(path, name);
  if (status == US_OK) status = us_tokenizer_parse(json.data, json.size, name, &tokenizer, err);
  if (status == US_OK)
    status = us_buffer_read_file(&input, us_opt_str(tool_run->opts, "input"), MAX_TEXT, err);
  if (status == US_OK)
    status = us_opt_flag(tool_run->opts, "decode") ? decode(tool_run, tokenizer, &input, err)
                                                   : encode(tool_run, tokenizer, &input, err);
  us_buffer_release(&json);
  us_buffer_release(&input);
  us_tokenizer_free(tokenizer);
  return status;
}

static const struct us_tool tool = {
    .name = "us-tokenize",
    .summary = "text to token ids and back",
    .description =
        "Writes one id a line. Text that is not UTF-8 is encoded with U+FFFD for each maximal invalid part; "
        "decoding writes the tokens' bytes as they are.",
    .examples = "us-tokenize -t tokenizer.json < text.txt > ids\nus-tokenize -t tokenizer.json -d < ids",
    .opts = opts,
    .run = run,
};

int main(int argc, char **argv) {
  return us_tool_main(&tool, argc, argv);
}
