/* UTF-8: strict decoding (no surrogates, no overlong forms, up to U+10FFFF). */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* Bytes of the valid character at s (1..4), 0 when s[0..n) does not begin with one. */
size_t utf8_length(const char *s, size_t n);
/* As utf8_length, and the code point. */
size_t utf8_decode(const char *s, size_t n, uint32_t *out_code);
/* Writes 1..4 bytes; code must be a scalar value. */
size_t utf8_encode(uint32_t code, char out[4]);
/* Length of the longest prefix made of whole valid characters. */
size_t utf8_valid_prefix(const char *s, size_t n);
/* Whether s[0..n) could be the beginning of one longer valid character (n from 1 to 3). */
int utf8_is_partial(const char *s, size_t n);
