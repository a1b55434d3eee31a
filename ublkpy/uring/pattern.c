// SPDX-License-Identifier: MIT
/*
 * Data that says where it is: each 8 bytes are their offset, the most
 * significant byte first, as in nbdkit's pattern plugin.
 */
#define _GNU_SOURCE
#include "engine.h"

#include <endian.h>

static void fill(unsigned char *buf, uint64_t len, uint64_t offset)
{
	for (uint64_t i = 0; i < len; i += sizeof(uint64_t)) {
		const uint64_t word = htobe64(offset + i);

		memcpy(buf + i, &word, sizeof(word));
	}
}

static int32_t check(const unsigned char *buf, uint64_t len, uint64_t offset)
{
	for (uint64_t i = 0; i < len; i += sizeof(uint64_t)) {
		const uint64_t word = htobe64(offset + i);

		if (memcmp(buf + i, &word, sizeof(word)))
			return -EIO;
	}
	return 0;
}

int32_t pattern_serve(const struct uq_queue *q,
		      const struct ublksrv_io_desc *iod,
		      const struct uq_piece *p)
{
	unsigned char *buf = piece_buf(q, p);
	int32_t res;

	if (iod_op(iod) == UBLK_IO_OP_READ) {
		fill(buf, p->len, p->offset);
		return data_out(q, iod, p);
	}
	if (iod_op(iod) != UBLK_IO_OP_WRITE)
		return -EOPNOTSUPP;
	res = data_in(q, iod, p);
	return res ? res : check(buf, p->len, p->offset);
}
