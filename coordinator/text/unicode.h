/* Classes of characters and normal forms, with the meanings that tokenizer files rely on.
 *
 * Unicode's tables come from utf8proc. Strings are valid UTF-8 everywhere here; whoever takes bytes
 * from outside makes them so with unicode_add_valid. It must never know tokenizers. */
#pragma once
#include "base/buf.h"

#include <stdint.h>

bool unicode_is_space(uint32_t code);       /* the property White_Space */
bool unicode_is_word(uint32_t code);        /* \w: alphabetic, marks, digits, connectors, joiners */
bool unicode_is_numeric(uint32_t code);     /* categories Nd, Nl, No */
bool unicode_is_punctuation(uint32_t code); /* ASCII punctuation or category P */
bool unicode_is_other(uint32_t code);       /* categories Cc, Cf, Cs, Co */
bool unicode_is_nonspacing(uint32_t code);  /* category Mn */
bool unicode_is_mark(uint32_t code);        /* category M */
bool unicode_is_cjk(uint32_t code);         /* the ideographs that BERT sets apart */

/* The character at s, which is valid UTF-8 and not empty; its length. */
size_t unicode_next(const char *s, size_t n, uint32_t *out_code);
/* Where the last character of s[0..n) begins; n > 0. */
size_t unicode_last(const char *s, size_t n);
enum err unicode_add_code(struct buf *out, uint32_t code);
/* Appends s; each maximal part of a broken sequence becomes U+FFFD (Unicode 15, section 3.9). */
enum err unicode_add_valid(struct buf *out, const char *s, size_t n);
/* The length of the broken part at s, which does not begin with a whole character; n > 0. */
size_t unicode_broken_length(const char *s, size_t n);

/* Appends s with every character in lower (upper) case, one by one, without regard to context. */
enum err unicode_add_lower(struct buf *out, const char *s, size_t n);
enum err unicode_add_upper(struct buf *out, const char *s, size_t n);
bool unicode_is_upper(uint32_t code);
bool unicode_is_lower(uint32_t code);
bool unicode_is_alphabetic(uint32_t code);

enum unicode_form { UNICODE_NFC, UNICODE_NFD, UNICODE_NFKC, UNICODE_NFKD };
/* Appends s in a normal form, in linear time for any text. */
enum err unicode_add_normal(struct buf *out, const char *s, size_t n, enum unicode_form form);
/* Bytes of the extended grapheme cluster at s; n > 0. */
size_t unicode_grapheme_length(const char *s, size_t n);
