// SPDX-License-Identifier: MIT
/*
 * What Python does with files of its own, on the queue's ring, which it waits
 * for anyway.
 */
#define _GNU_SOURCE
#include "engine.h"

int uq_file_op(struct uq_queue *q, uint32_t id, uint8_t opcode, int fd,
	       uint64_t addr, uint32_t len, uint64_t off, uint32_t flags)
{
	struct io_uring_sqe *sqe;

	if (q->file_ops + q->nr_ended == q->max_file_ops)
		return -EBUSY;
	q->file_ops++;
	sqe = new_sqe(q);
	sqe->opcode = opcode;
	sqe->flags = 0;
	sqe->fd = fd;
	sqe->addr = addr;
	sqe->len = len;
	sqe->off = off;
	sqe->fsync_flags = flags;
	sqe->user_data = user_data(FROM_FILE_OP, id);
	return 0;
}

void file_op_done(struct uq_queue *q, uint32_t id, int32_t res)
{
	q->file_ops--;
	q->ended[q->nr_ended++] = (struct uq_ended){ .id = id, .res = res };
}
