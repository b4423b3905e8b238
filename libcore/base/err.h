/* err.h: the status a call returns and the message it leaves.
 *
 *     struct us_err err = {0};
 *     if (us_thing_open(path, &thing, &err) != US_OK) return us_err_prefix(&err, "%s", path);
 *
 * Library code never prints and never exits: it returns a status and fills the caller's us_err once, where the
 * problem is seen; callers on the way up may prefix what they know (file, field). A tool's main prints the message
 * and exits with the status: the enum's values are the documented exit codes.
 */
#ifndef US_BASE_ERR_H
#define US_BASE_ERR_H

#ifdef __cplusplus
extern "C" {
#endif

enum us_status {
  US_OK = 0,
  US_ERR_CHECK = 1,     /* a check failed: the answer is no */
  US_ERR_USAGE = 2,     /* the command line or an argument is wrong */
  US_ERR_INPUT = 3,     /* a file's content is bad */
  US_ERR_IO = 4,        /* the system refused to read or write */
  US_ERR_DEVICE = 5,    /* the GPU, or a check of the engine */
  US_ERR_MEMORY = 6,    /* out of memory */
  US_INTERRUPTED = 130, /* SIGINT or SIGTERM */
};

#define US_ERR_MESSAGE_MAX 1024

struct us_err {
  enum us_status status;
  char message[US_ERR_MESSAGE_MAX]; /* one line (control characters become '?'), no full stop, no tool name */
};

#define US_CHECKED __attribute__((warn_unused_result))

#define US_PRINTF(format_arg, first_arg) __attribute__((format(printf, format_arg, first_arg)))

/* Set status and message; a NULL err only passes the status on. Returns status, so that `return us_err_set(...)`. */
enum us_status us_err_set(struct us_err *err, enum us_status status, const char *format, ...) US_PRINTF(3, 4);

/* As us_err_set, then ": " and strerror(errno) as it was on entry. ENOMEM becomes US_ERR_MEMORY. */
enum us_status us_err_errno(struct us_err *err, enum us_status status, const char *format, ...)
    US_PRINTF(3, 4);

/* Put "prefix: " before the message, truncating its end if it must. Returns err->status. */
enum us_status us_err_prefix(struct us_err *err, const char *format, ...) US_PRINTF(2, 3);

/* The usual message for a failed allocation of `bytes` for `what`. Returns US_ERR_MEMORY. */
enum us_status us_err_memory(struct us_err *err, const char *what, unsigned long long bytes);

#ifdef __cplusplus
}
#endif
#endif
