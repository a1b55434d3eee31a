// SPDX-License-Identifier: MIT
/*
 * Data that says where it is: each 8 bytes are their offset, the most
 * significant byte first, as in nbdkit's pattern plugin.
 */
#define _GNU_SOURCE
#include "engine.h"

#include <endian.h>

void pattern_fill(unsigned char *buf, uint64_t len, uint64_t offset)
{
	for (uint64_t i = 0; i < len; i += sizeof(uint64_t)) {
		const uint64_t word = htobe64(offset + i);

		memcpy(buf + i, &word, sizeof(word));
	}
}

int32_t pattern_check(const unsigned char *buf, uint64_t len, uint64_t offset)
{
	for (uint64_t i = 0; i < len; i += sizeof(uint64_t)) {
		const uint64_t word = htobe64(offset + i);

		if (memcmp(buf + i, &word, sizeof(word)))
			return -EIO;
	}
	return 0;
}
