/* optdoc.c: help, man page and completion from an option table. */
#include "base/optdoc.h"

#include <stdarg.h>
#include <string.h>

#define HELP_COLUMNS 79
#define HELP_INDENT  26

static bool is_row(const struct us_opt *opt) {
  return opt->kind != US_OPT_KIND_ARG && opt->kind != US_OPT_KIND_GROUP;
}

/* Write words of `text` from column `column` on, breaking lines before HELP_COLUMNS and indenting by `indent`. */
static void wrap(FILE *out, const char *text, int column, int indent) {
  while (*text) {
    int length = (int)strcspn(text, " \n");
    if (column > indent && column + 1 + length > HELP_COLUMNS) {
      fprintf(out, "\n%*s", indent, "");
      column = indent;
    }
    bool first = column == indent;
    if (length) column += fprintf(out, "%s%.*s", first ? "" : " ", length, text);
    text += length;
    if (text[0] == '\n' && text[1] == '\n') {
      fprintf(out, "\n\n%*s", indent, "");
      column = indent;
    }
    text += strspn(text, " \n");
  }
  fputc('\n', out);
}

void us_optdoc_usage(const struct us_optdoc *doc, FILE *out) {
  fprintf(out, "usage: %s", doc->tool);
  for (const struct us_opt *opt = doc->table; opt->kind; opt++)
    if (is_row(opt) && opt->required) fprintf(out, " --%s %s", opt->name, opt->value_name);
  fprintf(out, " [options]");
  for (const struct us_opt *opt = doc->table; opt->kind; opt++)
    if (opt->kind == US_OPT_KIND_ARG)
      fprintf(out, opt->required ? " %s%s" : " [%s%s]", opt->value_name, opt->repeat ? "..." : "");
  fputc('\n', out);
}

/* Append one remark to the bracket after a help text. */
US_PRINTF(3, 4) static void remark(char *text, size_t size, const char *format, ...) {
  size_t used = strlen(text);
  used += (size_t)snprintf(text + used, size - used, used ? ", " : " (");
  va_list args;
  va_start(args, format);
  if (used < size) vsnprintf(text + used, size - used, format, args);
  va_end(args);
}

/* What follows the help text in brackets: required, the range, may be repeated, the default. */
static void remarks(const struct us_opt *opt, char *text, size_t size) {
  bool number = opt->kind == US_OPT_KIND_INT || opt->kind == US_OPT_KIND_NUM;
  const char *from = opt->above_min ? "above" : "from";
  text[0] = 0;
  if (opt->required) remark(text, size, "required");
  if (number && (opt->max != 0 || opt->above_min || opt->min != 0)) {
    if (opt->max != 0)
      remark(text, size, "%s %.10g to %.10g", from, opt->min, opt->max);
    else
      remark(text, size, "%s %.10g", from, opt->min);
  }
  if (opt->repeat && opt->kind != US_OPT_KIND_FLAG) remark(text, size, "may be repeated");
  if (opt->def) remark(text, size, "default %s", opt->def);
  size_t used = strlen(text);
  if (used && used + 1 < size) memcpy(text + used, ")", 2);
}

static void help_row(const struct us_opt *opt, FILE *out) {
  char text[1024], note[256];
  remarks(opt, note, sizeof note);
  snprintf(text, sizeof text, "%s%s", opt->help, note);
  int column = 0;
  if (opt->kind == US_OPT_KIND_ARG)
    column = fprintf(out, "  %s", opt->value_name);
  else if (opt->letter)
    column = fprintf(out, "  -%c, --%s", opt->letter, opt->name);
  else
    column = fprintf(out, "      --%s", opt->name);
  if (is_row(opt) && opt->value_name) column += fprintf(out, " %s", opt->value_name);
  if (column + 2 > HELP_INDENT)
    fprintf(out, "\n%*s", HELP_INDENT, "");
  else
    fprintf(out, "%*s", HELP_INDENT - column, "");
  wrap(out, text, HELP_INDENT, HELP_INDENT);
}

void us_optdoc_help(const struct us_optdoc *doc, FILE *out) {
  us_optdoc_usage(doc, out);
  fprintf(out, "%s: %s\n", doc->tool, doc->summary);
  if (doc->description) {
    fputc('\n', out);
    wrap(out, doc->description, 0, 0);
  }
  bool heading = false;
  for (const struct us_opt *opt = doc->table; opt->kind; opt++)
    if (opt->kind == US_OPT_KIND_ARG) {
      if (!heading) fprintf(out, "\nArguments:\n");
      heading = true;
      help_row(opt, out);
    }
  if (is_row(doc->table) || doc->table->kind == US_OPT_KIND_ARG) fprintf(out, "\nOptions:\n");
  for (const struct us_opt *opt = doc->table; opt->kind; opt++) {
    if (opt->kind == US_OPT_KIND_GROUP) fprintf(out, "\n%s:\n", opt->name);
    if (is_row(opt)) help_row(opt, out);
  }
  fputs("\nIntegers take K, M or G (powers of 1024). Exit codes: 0 done, 1 a check\n"
        "failed, 2 usage, 3 bad input, 4 I/O, 5 device, 6 memory, 130 interrupted.\n",
        out);
  if (doc->examples) fprintf(out, "\nExamples:\n%s\n", doc->examples);
}

/* --- man page --- */

/* Text with roff's special characters escaped; `begins` when it starts a line, where . and ' are requests. */
static void roff(FILE *out, const char *text, size_t length, bool begins) {
  for (size_t i = 0; i < length; i++) {
    char c = text[i];
    if (begins && (c == '.' || c == '\'')) fputs("\\&", out);
    if (c == '\\')
      fputs("\\e", out);
    else if (c == '-')
      fputs("\\-", out);
    else if (c == '"')
      fputs("\\(dq", out);
    else
      fputc(c, out);
    begins = false;
  }
}

/* A macro argument: quoted, so that blanks and the names of macros are plain text. */
static void roff_arg(FILE *out, const char *text) {
  fputs(" \"", out);
  if (strlen(text) <= 3) fputs("\\&", out);
  roff(out, text, strlen(text), false);
  fputc('"', out);
}

/* Running text of `length` bytes, without newlines: roff wants every sentence to begin a line. */
static void roff_sentences(FILE *out, const char *text, size_t length) {
  size_t from = 0;
  for (size_t i = 0; i + 1 < length; i++) {
    size_t end = i + 1 + (text[i + 1] == ')');
    if (!strchr(".?!", text[i]) || end >= length || text[end] != ' ') continue;
    roff(out, text + from, end - from, true);
    fputc('\n', out);
    from = end + strspn(text + end, " ");
    i = from - 1;
  }
  roff(out, text + from, length - from, true);
  fputc('\n', out);
}

static void roff_paragraphs(FILE *out, const char *text) {
  while (*text) {
    size_t length = strcspn(text, "\n");
    if (length) { roff_sentences(out, text, length); }
    text += length;
    if (text[0] == '\n' && text[1] == '\n' && text[2]) fputs(".Pp\n", out);
    text += strspn(text, "\n");
  }
}

static void man_synopsis(const struct us_optdoc *doc, FILE *out) {
  fputs(".Sh SYNOPSIS\n.Nm\n", out);
  for (const struct us_opt *opt = doc->table; opt->kind; opt++)
    if (is_row(opt) && opt->required) {
      fprintf(out, ".Fl \\-%s Ar", opt->name);
      roff_arg(out, opt->value_name);
      fputc('\n', out);
    }
  fputs(".Op Ar options\n", out);
  for (const struct us_opt *opt = doc->table; opt->kind; opt++)
    if (opt->kind == US_OPT_KIND_ARG) {
      fputs(opt->required ? ".Ar" : ".Op Ar", out);
      roff_arg(out, opt->value_name);
      fputs(opt->repeat ? " ...\n" : "\n", out);
    }
}

static void man_row(const struct us_opt *opt, FILE *out) {
  char text[1024], note[256];
  remarks(opt, note, sizeof note);
  snprintf(text, sizeof text, "%s%s", opt->help, note);
  fputs(".It", out);
  if (is_row(opt)) {
    if (opt->letter) fprintf(out, " Fl %c ,", opt->letter);
    fputs(" Fl \\-", out);
    roff(out, opt->name, strlen(opt->name), false);
  }
  if (opt->value_name) {
    fputs(" Ar", out);
    roff_arg(out, opt->value_name);
  }
  fputc('\n', out);
  roff_sentences(out, text, strlen(text));
}

static void man_rows(const struct us_optdoc *doc, FILE *out) {
  bool open = false;
  for (const struct us_opt *opt = doc->table; opt->kind; opt++) {
    if (opt->kind == US_OPT_KIND_GROUP) {
      if (open) fputs(".El\n", out);
      fputs(".Ss", out);
      roff_arg(out, opt->name);
      fputc('\n', out);
      open = false;
      continue;
    }
    if (!open) fputs(".Bl -tag -width Ds\n", out);
    open = true;
    man_row(opt, out);
  }
  if (open) fputs(".El\n", out);
}

static void man_examples(const char *text, FILE *out) {
  fputs(".Sh EXAMPLES\n", out);
  bool first = true; /* a section begins a paragraph by itself */
  while (*text) {
    size_t length = strcspn(text, "\n"), skip = strspn(text, "# ");
    if (length) {
      bool comment = text[0] == '#';
      if (comment && !first) fputs(".Pp\n", out);
      if (!comment) fputs(".Dl ", out);
      first = false;
      roff(out, text + skip, length - skip, true);
      fputc('\n', out);
    }
    text += length + (text[length] == '\n');
  }
}

void us_optdoc_man(const struct us_optdoc *doc, FILE *out) {
  char upper[64];
  size_t n = 0;
  for (; doc->tool[n] && n + 1 < sizeof upper; n++)
    upper[n] = (char)(doc->tool[n] >= 'a' && doc->tool[n] <= 'z' ? doc->tool[n] - 32 : doc->tool[n]);
  upper[n] = 0;
  fprintf(out, ".Dd $Mdocdate$\n.Dt %s 1\n.Os UltraSpeed %s\n.Sh NAME\n.Nm %s\n.Nd ", upper, doc->version,
          doc->tool);
  roff_sentences(out, doc->summary, strlen(doc->summary));
  man_synopsis(doc, out);
  fputs(".Sh DESCRIPTION\n", out);
  if (doc->description) {
    roff_paragraphs(out, doc->description);
    fputs(".Pp\n", out);
  }
  fputs("The options are as follows.\nIntegers take K, M or G, powers of 1024.\n"
        "Names are never abbreviated; of an option given twice the last value counts, unless it may be "
        "repeated.\n",
        out);
  man_rows(doc, out);
  fputs(".Sh EXIT STATUS\n.Bl -tag -width Ds -compact\n.It 0\ndone\n.It 1\na check failed: the answer is no\n"
        ".It 2\nwrong usage\n.It 3\nbad input\n.It 4\ninput or output failed\n.It 5\nthe device failed\n"
        ".It 6\nout of memory\n.It 130\ninterrupted\n.El\n",
        out);
  if (doc->examples) man_examples(doc->examples, out);
}

/* --- completion --- */

static void shell_name(FILE *out, const char *tool) {
  fputc('_', out);
  for (; *tool; tool++) fputc(*tool == '-' ? '_' : *tool, out);
}

static void completion_case(const struct us_opt *opt, FILE *out) {
  if (opt->kind == US_OPT_KIND_FLAG || opt->kind == US_OPT_KIND_ARG || opt->kind == US_OPT_KIND_GROUP) return;
  fprintf(out, "    --%s", opt->name);
  if (opt->letter) fprintf(out, "|-%c", opt->letter);
  fputs(") ", out);
  if (opt->kind == US_OPT_KIND_FILE)
    fputs("compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -- \"$cur\"))", out);
  else if (opt->kind == US_OPT_KIND_DEVICE)
    fputs("COMPREPLY=($(compgen -W 'cpu cuda cuda:0' -- \"$cur\"))", out);
  else if (opt->kind == US_OPT_KIND_ENUM) {
    fputs("COMPREPLY=($(compgen -W '", out);
    for (const char *c = opt->value_name; *c; c++) fputc(*c == '|' ? ' ' : *c, out);
    fputs("' -- \"$cur\"))", out);
  } else
    fputs("COMPREPLY=()", out);
  fputs("; return ;;\n", out);
}

void us_optdoc_completion(const struct us_optdoc *doc, FILE *out) {
  fprintf(out, "# bash completion for %s, made from its option table\n", doc->tool);
  shell_name(out, doc->tool);
  fputs("() {\n  local cur=\"${COMP_WORDS[COMP_CWORD]}\" prev=\"${COMP_WORDS[COMP_CWORD-1]}\"\n  case "
        "\"$prev\" in\n",
        out);
  for (const struct us_opt *opt = doc->table; opt->kind; opt++) completion_case(opt, out);
  fputs("  esac\n  if [[ $cur == -* ]]; then\n    COMPREPLY=($(compgen -W '", out);
  const char *space = "";
  for (const struct us_opt *opt = doc->table; opt->kind; opt++)
    if (is_row(opt)) {
      fprintf(out, "%s--%s", space, opt->name);
      if (opt->letter) fprintf(out, " -%c", opt->letter);
      space = " ";
    }
  fputs("' -- \"$cur\"))\n  else\n    compopt -o filenames 2>/dev/null\n    COMPREPLY=($(compgen -f -- "
        "\"$cur\"))\n"
        "  fi\n}\ncomplete -F ",
        out);
  shell_name(out, doc->tool);
  fprintf(out, " %s\n", doc->tool);
}
