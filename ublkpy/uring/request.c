// SPDX-License-Identifier: MIT
/*
 * A request on its way:
 *
 *   start ─▶ data in ─▶ pieces at the backing ─▶ data out ─▶ commit
 *
 * Data in is a WRITE's, data out a READ's, in the modes in which we fetch it
 * ourselves. Where the map's answer ends inside a request, the request is served
 * in pieces, in parallel; its result is all or the first error.
 */
#define _GNU_SOURCE
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/uio.h>

#define MAX_RETRIES	64

#define PUNCH		(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
#define ZERO		(FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE)
#define ALLOCATE	FALLOC_FL_KEEP_SIZE

static inline void commit(struct uq_queue *q, uint16_t tag, int32_t res)
{
	if (q->ios[tag].way == UQ_REGISTERED) {
		struct io_uring_sqe *sqe =
			tag_cmd(q, UBLK_U_IO_UNREGISTER_IO_BUF, tag, 0, tag);

		sqe->flags |= IOSQE_CQE_SKIP_SUCCESS;
		sqe->user_data = user_data(FROM_NOBODY, 0);
	}
	drv_commit(q, tag, res);
}

static void commit_error(struct uq_queue *q, uint16_t tag, int32_t res)
{
	const struct ublksrv_io_desc *iod = &q->iods[tag];

	q->errors++;
	q->error_op = iod_op(iod);
	q->error_res = res;
	q->error_sector = iod->start_sector;
	/* The 1st, 2nd, 4th, 8th ...: a failing disk must not flood the log. */
	if (!(q->errors & (q->errors - 1)))
		q->report = true;
	commit(q, tag, res);
}

/*
 * The only place where results are made. A short count would be taken for
 * success by Linux 7.3, so it is all bytes or an errno; ops without data
 * answer 0.
 */
static void commit_result(struct uq_queue *q, uint16_t tag)
{
	const struct uq_io *io = &q->ios[tag];

	if (io->error)
		commit_error(q, tag, io->error);
	else
		commit(q, tag,
		       moves_data(iod_op(&q->iods[tag])) ? (int32_t)io->len : 0);
}

/* -- data in and out ------------------------------------------------------- */

/* READ or WRITE of what is left between a file and the tag's buffer. */
static void prep_rw(struct uq_queue *q, const struct uq_piece *p, bool write,
		    struct io_uring_sqe *sqe)
{
	uint64_t pos = p->pos + p->done;

	if (p->step == UQ_BACKING && in_place(&q->ios[p->tag])) {
		sqe->opcode = write ? IORING_OP_WRITE_FIXED :
				      IORING_OP_READ_FIXED;
		sqe->buf_index = p->tag;
		sqe->addr = pos;
	} else {
		sqe->opcode = write ? IORING_OP_WRITE : IORING_OP_READ;
		sqe->addr = (uint64_t)(uintptr_t)(tag_buf(q, p->tag) + pos);
	}
	sqe->off = p->offset + p->done;
	sqe->len = (uint32_t)(p->len - p->done);
}

/* Moves the whole request between the character device and the buffer. */
static void copy_at_driver(struct uq_queue *q, struct uq_piece *p)
{
	struct io_uring_sqe *sqe = new_sqe(q, CDEV_SLOT);

	prep_rw(q, p, p->step == UQ_PUSH, sqe);
	sqe->user_data = user_data(FROM_PIECE, (uint32_t)(p - q->pieces));
}

static void start_copy(struct uq_queue *q, uint16_t tag, enum uq_step step)
{
	struct uq_piece *p = &q->pieces[tag];

	p->step = (uint8_t)step;
	p->pos = 0;
	p->done = 0;
	p->retries = 0;
	p->len = q->ios[tag].len;
	p->offset = UBLKSRV_IO_BUF_OFFSET +
		    ((uint64_t)q->opt.q_id << UBLK_QID_OFF) +
		    ((uint64_t)tag << UBLK_TAG_OFF);
	copy_at_driver(q, p);
}

static void get_data(struct uq_queue *q, uint16_t tag)
{
	struct io_uring_sqe *sqe;

	q->pieces[tag].step = UQ_GET;
	sqe = tag_cmd(q, UBLK_U_IO_NEED_GET_DATA, tag, 0,
		      (uint64_t)(uintptr_t)tag_buf(q, tag));
	sqe->user_data = user_data(FROM_PIECE, tag);
}

/* Executed while it is submitted, and so before what follows it uses it. */
static void register_pages(struct uq_queue *q, uint16_t tag)
{
	struct io_uring_sqe *sqe =
		tag_cmd(q, UBLK_U_IO_REGISTER_IO_BUF, tag, 0, tag);

	sqe->flags |= IOSQE_CQE_SKIP_SUCCESS;
	sqe->user_data = user_data(FROM_NOBODY, 0);
	q->ios[tag].way = UQ_REGISTERED;
}

/* -- pieces at the backing ------------------------------------------------- */

/* What the map says about a place, and how far that holds. */
struct answer {
	uint64_t len;
	uint64_t offset;
	uint16_t slot;
	bool nothing;		/* succeeds and moves nothing */
};

static inline struct answer look_up(const struct uq_queue *q, uint64_t pos,
				    uint64_t len)
{
	return (struct answer){
		.len = len,
		.offset = q->map.offset + pos,
		.slot = BACKING_SLOT,
		.nothing = q->map.route == UQ_NULL,
	};
}

static void prep_fallocate(struct io_uring_sqe *sqe, const struct uq_piece *p,
			   uint32_t mode)
{
	sqe->opcode = IORING_OP_FALLOCATE;
	sqe->off = p->offset;
	sqe->addr = p->len;
	sqe->len = mode;
}

static void prep_discard(const struct uq_queue *q, struct io_uring_sqe *sqe,
			 const struct uq_piece *p)
{
	if (!q->map.is_block_device) {
		prep_fallocate(sqe, p, PUNCH);
		return;
	}
	sqe->opcode = IORING_OP_URING_CMD;
	sqe->cmd_op = BLOCK_URING_CMD_DISCARD;
	sqe->addr = p->offset;
	sqe->addr3 = p->len;
}

/* Sends what is left of a piece. */
static void submit_piece(struct uq_queue *q, struct uq_piece *p)
{
	const struct ublksrv_io_desc *iod = &q->iods[p->tag];
	struct io_uring_sqe *sqe = new_sqe(q, p->slot);

	sqe->user_data = user_data(FROM_PIECE, (uint32_t)(p - q->pieces));
	switch (iod_op(iod)) {
	case UBLK_IO_OP_READ:
		prep_rw(q, p, false, sqe);
		break;
	case UBLK_IO_OP_WRITE:
		prep_rw(q, p, true, sqe);
		if (iod->op_flags & UBLK_IO_F_FUA)
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
		prep_fallocate(sqe, p, p->mode);
	}
}

/* The tag's own piece, or a spare one; NULL when there is none. */
static struct uq_piece *take_piece(struct uq_queue *q, uint16_t tag)
{
	struct uq_piece *p;

	if (!q->ios[tag].pending)
		return &q->pieces[tag];
	if (q->free_piece < 0)
		return NULL;
	p = &q->pieces[q->free_piece];
	q->free_piece = p->next_free;
	return p;
}

static void free_piece(struct uq_queue *q, struct uq_piece *p)
{
	int32_t nr = (int32_t)(p - q->pieces);

	if (nr < q->opt.depth)
		return;
	p->next_free = q->free_piece;
	q->free_piece = nr;
}

/* Nothing of it is at the backing any more. */
static void finish(struct uq_queue *q, uint16_t tag)
{
	const struct uq_io *io = &q->ios[tag];

	if (io->way == UQ_COPIED && !io->error &&
	    iod_op(&q->iods[tag]) == UBLK_IO_OP_READ && q->map.route != UQ_NULL)
		start_copy(q, tag, UQ_PUSH);
	else
		commit_result(q, tag);
}

/*
 * Sends as much of a request as there are pieces for. What is left follows when
 * one of them comes back.
 */
static void issue(struct uq_queue *q, uint16_t tag)
{
	const struct ublksrv_io_desc *iod = &q->iods[tag];
	uint64_t start = iod->start_sector << SECTOR_SHIFT;
	struct uq_io *io = &q->ios[tag];

	do {
		struct answer a = look_up(q, start + io->next,
					  io->len - io->next);
		struct uq_piece *p;

		if (a.nothing) {
			io->next += a.len;
			continue;
		}
		p = take_piece(q, tag);
		if (!p)
			return;
		if (io->way == UQ_UNREGISTERED)
			register_pages(q, tag);
		p->tag = tag;
		p->step = UQ_BACKING;
		p->slot = a.slot;
		p->pos = io->next;
		p->offset = a.offset;
		p->len = a.len;
		p->done = 0;
		p->retries = 0;
		p->mode = iod->op_flags & UBLK_IO_F_NOUNMAP ? ZERO : PUNCH;
		io->next += a.len;
		io->pending++;
		submit_piece(q, p);
	} while (io->next < io->len && !io->error);
	if (!io->pending)
		finish(q, tag);
}

static uint8_t way(const struct uq_queue *q, const struct ublksrv_io_desc *iod)
{
	switch ((enum uq_data)q->opt.data) {
	case UQ_USER_COPY:
		return UQ_COPIED;
	case UQ_ZERO_COPY:
		return UQ_UNREGISTERED;
	case UQ_AUTO_BUF: /* there was no place for a buffer */
		return iod->op_flags & UBLK_IO_F_NEED_REG_BUF ? UQ_COPIED :
								UQ_REGISTERED_BY_DRIVER;
	default:
		return UQ_IN_BUFFER;
	}
}

/* The descriptor is there, and the data as far as the driver brings it. */
static void begin(struct uq_queue *q, uint16_t tag)
{
	const struct ublksrv_io_desc *iod = &q->iods[tag];
	struct uq_io *io = &q->ios[tag];
	uint32_t op = iod_op(iod);

	io->len = op == UBLK_IO_OP_FLUSH ? 0 : iod_bytes(iod);
	io->next = 0;
	io->error = 0;
	io->pending = 0;
	io->way = UQ_IN_BUFFER;
	switch (op) {
	case UBLK_IO_OP_READ:
	case UBLK_IO_OP_WRITE:
		if (io->len > q->opt.buf_bytes) {
			commit_error(q, tag, -EIO);
			return;
		}
		io->way = way(q, iod);
		break;
	case UBLK_IO_OP_FLUSH:
	case UBLK_IO_OP_DISCARD:
	case UBLK_IO_OP_WRITE_ZEROES:
		break;
	default:
		commit_error(q, tag, -EOPNOTSUPP);
		return;
	}
	if (op == UBLK_IO_OP_WRITE && io->way == UQ_COPIED &&
	    q->map.route != UQ_NULL)
		start_copy(q, tag, UQ_PULL);
	else
		issue(q, tag);
}

/*
 * A new request has arrived on a tag. The driver takes no result for a WRITE
 * whose data it offers before that is taken, whatever the result.
 */
void req_start(struct uq_queue *q, uint16_t tag, bool wants_data)
{
	if (wants_data)
		get_data(q, tag);
	else
		begin(q, tag);
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

/* The result of READ, WRITE: whether all of it is there now, or an errno. */
static int32_t count(struct uq_piece *p, int32_t res)
{
	/* No progress: the file ends before the device does. */
	if (!res)
		return -EIO;
	if (res < 0)
		return res;
	p->done += (uint32_t)res;
	return p->done == p->len;
}

static void backing_done(struct uq_queue *q, struct uq_piece *p, int32_t res)
{
	const struct ublksrv_io_desc *iod = &q->iods[p->tag];
	struct uq_io *io = &q->ios[p->tag];
	uint16_t tag = p->tag;

	if (moves_data(iod_op(iod))) {
		res = count(p, res);
		if (!res) {
			submit_piece(q, p);
			return;
		}
	} else if (iod_op(iod) == UBLK_IO_OP_WRITE_ZEROES) {
		uint16_t mode = next_zero_mode(iod, p->mode, res);

		if (mode) {
			p->mode = mode;
			submit_piece(q, p);
			return;
		}
	}
	if (res < 0 && !io->error)
		io->error = res;
	free_piece(q, p);
	io->pending--;
	if (io->next < io->len && !io->error)
		issue(q, tag);
	else if (!io->pending)
		finish(q, tag);
}

static void copy_done(struct uq_queue *q, struct uq_piece *p, int32_t res)
{
	res = count(p, res);
	if (!res) {
		copy_at_driver(q, p);
		return;
	}
	if (res < 0)
		q->ios[p->tag].error = res;
	if (res < 0 || p->step == UQ_PUSH)
		commit_result(q, p->tag);
	else
		issue(q, p->tag);
}

void req_piece_done(struct uq_queue *q, uint32_t nr, int32_t res)
{
	struct uq_piece *p = &q->pieces[nr];

	if ((res == -EINTR || res == -EAGAIN) && p->step != UQ_GET &&
	    p->retries < MAX_RETRIES) {
		p->retries++;
		if (p->step == UQ_BACKING)
			submit_piece(q, p);
		else
			copy_at_driver(q, p);
		return;
	}
	switch (p->step) {
	case UQ_BACKING:
		backing_done(q, p, res);
		break;
	case UQ_GET:
		if (res == UBLK_IO_RES_OK)
			begin(q, p->tag);
		else if (res == UBLK_IO_RES_ABORT)
			q->live--;
		else
			q->failed = res < 0 ? res : -EPROTO;
		break;
	default: /* UQ_PULL, UQ_PUSH */
		copy_done(q, p, res);
	}
}
