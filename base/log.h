/* One line per event, to stderr: time, level, who, words. JSON lines with --log-format json.
 *
 * Lines are written whole, so that processes sharing a terminal do not mix them. */
#pragma once

enum log_level { LOG_DEBUG, LOG_INFO, LOG_WARN, LOG_ERROR };

void log_set_level(enum log_level level);
void log_set_json(int on);
/* Names this process in every line: "coordinator", "worker 0.1". Copied. */
void log_set_who(const char *who);
void log_line(enum log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));

#define log_debug(...) log_line(LOG_DEBUG, __VA_ARGS__)
#define log_info(...) log_line(LOG_INFO, __VA_ARGS__)
#define log_warn(...) log_line(LOG_WARN, __VA_ARGS__)
#define log_error(...) log_line(LOG_ERROR, __VA_ARGS__)
