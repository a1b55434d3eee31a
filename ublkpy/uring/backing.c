// SPDX-License-Identifier: MIT
/*
 * The op of a piece at the file behind it: what is sent, and what its result
 * says.
 */
#define _GNU_SOURCE
#include "engine.h"

#include <fcntl.h>
#include <sys/uio.h>

#define PUNCH		(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
#define ZERO		(FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE)
#define ALLOCATE	FALLOC_FL_KEEP_SIZE

/* READ or WRITE of what is left, between a file and the client's pages. */
static void prep_rw_fixed(const struct uq_piece *p, bool write,
			  struct io_uring_sqe *sqe)
{
	sqe->opcode = write ? IORING_OP_WRITE_FIXED : IORING_OP_READ_FIXED;
	sqe->buf_index = p->tag;
	sqe->addr = p->pos + p->done;
	sqe->len = p->len - p->done;
}

static void prep_fallocate(struct io_uring_sqe *sqe, const struct uq_piece *p,
			   uint32_t mode)
{
	sqe->opcode = IORING_OP_FALLOCATE;
	sqe->off = p->offset;
	sqe->addr = p->width;
	sqe->len = mode;
}

static void prep_discard(const struct uq_queue *q, struct io_uring_sqe *sqe,
			 const struct uq_piece *p)
{
	if (!q->view->files[p->slot].is_block_device) {
		prep_fallocate(sqe, p, PUNCH);
		return;
	}
	sqe->opcode = IORING_OP_URING_CMD;
	sqe->cmd_op = BLOCK_URING_CMD_DISCARD;
	sqe->addr = p->offset;
	sqe->addr3 = p->width;
}

void back_submit(struct uq_queue *q, const struct ublksrv_io_desc *iod,
		 struct uq_piece *p)
{
	uint32_t op = iod_op(iod);
	struct io_uring_sqe *sqe;

	if (q->ios[p->tag].way == UQ_UNREGISTERED)
		data_register(q, p->tag);
	sqe = new_sqe(q);
	name_file(q, p, sqe);
	sqe->user_data = piece_data(q, p);
	switch (op) {
	case UBLK_IO_OP_READ:
	case UBLK_IO_OP_WRITE:
		if (in_place(&q->ios[p->tag])) {
			prep_rw_fixed(p, op == UBLK_IO_OP_WRITE, sqe);
			/* It cannot without a thread, and need not be tried. */
			if (q->view->files[p->slot].in_memory)
				sqe->flags |= IOSQE_ASYNC;
		} else {
			prep_rw(q, p, op == UBLK_IO_OP_WRITE, sqe);
		}
		sqe->off = p->offset + p->done;
		if (iod->op_flags & UBLK_IO_F_FUA && op == UBLK_IO_OP_WRITE)
			sqe->rw_flags = RWF_DSYNC;
		break;
	case UBLK_IO_OP_FLUSH:
		sqe->opcode = IORING_OP_FSYNC;
		sqe->fsync_flags = IORING_FSYNC_DATASYNC;
		break;
	case UBLK_IO_OP_DISCARD:
		prep_discard(q, sqe, p);
		break;
	default: /* WRITE_ZEROES */
		if (!p->mode)
			p->mode = iod->op_flags & UBLK_IO_F_NOUNMAP ? ZERO :
								      PUNCH;
		prep_fallocate(sqe, p, p->mode);
	}
}

int32_t back_at_once(const struct uq_queue *q,
		     const struct ublksrv_io_desc *iod,
		     const struct uq_piece *p)
{
	bool write = iod_op(iod) == UBLK_IO_OP_WRITE;
	bool fua = write && iod->op_flags & UBLK_IO_F_FUA;

	return data_move(q->view->files[p->slot].fd, write, piece_buf(q, p),
			 p->len, p->offset, fua ? RWF_DSYNC : 0);
}

/*
 * The next fallocate mode that a WRITE_ZEROES needs after this result, or 0.
 * Zeroes that may be unmapped: punch, else write them. Zeroes that must stay
 * allocated: write them, else punch and allocate again.
 */
static uint16_t next_zero_mode(const struct ublksrv_io_desc *iod, uint16_t mode,
			       int32_t res)
{
	bool nounmap = iod->op_flags & UBLK_IO_F_NOUNMAP;

	if (res == -EOPNOTSUPP && mode == (nounmap ? ZERO : PUNCH))
		return nounmap ? PUNCH : ZERO;
	if (!res && nounmap && mode == PUNCH)
		return ALLOCATE;
	return 0;
}

int32_t back_done(struct uq_queue *q, const struct ublksrv_io_desc *iod,
		  struct uq_piece *p, int32_t res)
{
	uint16_t mode = 0;

	if (moves_data(iod_op(iod))) {
		res = count(p, res);
		if (res)
			return res;
	} else {
		if (iod_op(iod) == UBLK_IO_OP_WRITE_ZEROES)
			mode = next_zero_mode(iod, p->mode, res);
		if (!mode)
			return res < 0 ? res : 1;
		p->mode = mode;
	}
	back_submit(q, iod, p);
	return 0;
}
