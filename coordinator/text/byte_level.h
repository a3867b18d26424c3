/* GPT-2's alphabet: each of the 256 bytes as one printable character, so that any text can be
 * written as a string of pieces without spaces (Radford et al. 2019, section 2.2). */
#pragma once
#include "base/buf.h"

#include <stdint.h>

/* Appends each byte of s as its character. */
enum err byte_level_add(struct buf *out, const char *s, size_t n);
/* The byte of a character, -1 when it is not in the alphabet. */
int byte_level_byte(uint32_t code);
/* Appends the bytes that piece stands for; the piece itself when it leaves the alphabet. */
enum err byte_level_add_bytes(struct buf *out, const char *piece, size_t n);
