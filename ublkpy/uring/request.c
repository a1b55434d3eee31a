// SPDX-License-Identifier: MIT
/*
 * A request on its way. It is served in pieces, in parallel: one for each place
 * that the map names. Its result is all, or the first error.
 *
 *   request  begin ─▶ pieces ─▶ commit
 *   piece    look up ─▶ data in ─▶ backing or Python ─▶ data out ─▶ look up ...
 *
 * Data in is a WRITE's, data out a READ's, where we copy it ourselves.
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
	const struct ublksrv_io_desc *iod = &q->iods[tag];

	if (q->ios[tag].error)
		commit_error(q, tag, q->ios[tag].error);
	else
		commit(q, tag,
		       moves_data(iod_op(iod)) ? (int32_t)iod_bytes(iod) : 0);
}

/* -- the SQEs of a piece --------------------------------------------------- */

static inline uint64_t piece_data(const struct uq_queue *q,
				  const struct uq_piece *p)
{
	return user_data(FROM_PIECE, (uint32_t)(p - q->pieces));
}

/* READ or WRITE of what is left, between a file and the tag's buffer. */
static void prep_rw(struct uq_queue *q, const struct uq_piece *p, bool write,
		    struct io_uring_sqe *sqe)
{
	sqe->opcode = write ? IORING_OP_WRITE : IORING_OP_READ;
	sqe->addr = (uint64_t)(uintptr_t)(tag_buf(q, p->tag) + p->pos + p->done);
	sqe->len = (uint32_t)(p->len - p->done);
}

/* Likewise, between a file and the client's pages. */
static void prep_rw_fixed(const struct uq_piece *p, bool write,
			  struct io_uring_sqe *sqe)
{
	sqe->opcode = write ? IORING_OP_WRITE_FIXED : IORING_OP_READ_FIXED;
	sqe->buf_index = p->tag;
	sqe->addr = p->pos + p->done;
	sqe->len = (uint32_t)(p->len - p->done);
}

/* Between the character device and the buffer. */
static void copy_at_driver(struct uq_queue *q, struct uq_piece *p)
{
	struct io_uring_sqe *sqe = new_sqe(q);

	prep_rw(q, p, p->step == UQ_PUSH, sqe);
	sqe->off = UBLKSRV_IO_BUF_OFFSET +
		   ((uint64_t)q->opt.q_id << UBLK_QID_OFF) +
		   ((uint64_t)p->tag << UBLK_TAG_OFF) + p->pos + p->done;
	sqe->user_data = piece_data(q, p);
}

static void get_data(struct uq_queue *q, uint16_t tag)
{
	struct io_uring_sqe *sqe;

	q->pieces[tag].step = UQ_GET;
	sqe = tag_cmd(q, UBLK_U_IO_NEED_GET_DATA, tag, 0,
		      (uint64_t)(uintptr_t)tag_buf(q, tag));
	sqe->user_data = piece_data(q, &q->pieces[tag]);
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
	if (!q->view->files[p->slot].is_block_device) {
		prep_fallocate(sqe, p, PUNCH);
		return;
	}
	sqe->opcode = IORING_OP_URING_CMD;
	sqe->cmd_op = BLOCK_URING_CMD_DISCARD;
	sqe->addr = p->offset;
	sqe->addr3 = p->len;
}

/* Sends what is left of it to the backing. */
static void submit_piece(struct uq_queue *q, struct uq_piece *p)
{
	const struct ublksrv_io_desc *iod = &q->iods[p->tag];
	uint32_t op = iod_op(iod);
	struct io_uring_sqe *sqe;

	if (q->ios[p->tag].way == UQ_UNREGISTERED)
		register_pages(q, p->tag);
	sqe = new_sqe(q);
	if (p->slot < q->nr_fixed) {
		sqe->fd = FIRST_FILE_SLOT + p->slot;
	} else {
		sqe->fd = q->view->files[p->slot].fd;
		sqe->flags = 0;
	}
	sqe->user_data = piece_data(q, p);
	switch (op) {
	case UBLK_IO_OP_READ:
	case UBLK_IO_OP_WRITE:
		if (in_place(&q->ios[p->tag]))
			prep_rw_fixed(p, op == UBLK_IO_OP_WRITE, sqe);
		else
			prep_rw(q, p, op == UBLK_IO_OP_WRITE, sqe);
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
		prep_fallocate(sqe, p, p->mode);
	}
}

/* -- from step to step ----------------------------------------------------- */

/* Whether its data goes through the buffer, though the driver does not. */
static inline bool copies(const struct uq_queue *q, const struct uq_piece *p)
{
	const struct uq_io *io = &q->ios[p->tag];

	return io->way == UQ_COPIED ||
	       (io->way > UQ_COPIED && p->kind != UM_FILE);
}

static void begin_step(struct uq_piece *p, enum uq_step step)
{
	p->step = (uint8_t)step;
	p->done = 0;
	p->retries = 0;
}

/* The data of a WRITE is there. */
static void act(struct uq_queue *q, struct uq_piece *p)
{
	int32_t nr = (int32_t)(p - q->pieces);

	if (p->kind == UM_FILE) {
		begin_step(p, UQ_BACKING);
		submit_piece(q, p);
		return;
	}
	begin_step(p, UQ_ASKED);
	q->upcalls++;
	p->next = -1;
	if (q->asked < 0)
		q->asked = nr;
	else
		q->pieces[q->last_asked].next = nr;
	q->last_asked = nr;
}

static void launch(struct uq_queue *q, struct uq_piece *p)
{
	if (iod_op(&q->iods[p->tag]) == UBLK_IO_OP_WRITE && copies(q, p)) {
		begin_step(p, UQ_PULL);
		copy_at_driver(q, p);
	} else {
		act(q, p);
	}
}

/* The len bytes are through, and the data of a READ is here. */
static void acted(struct uq_queue *q, struct uq_piece *p)
{
	if (iod_op(&q->iods[p->tag]) == UBLK_IO_OP_READ && copies(q, p)) {
		begin_step(p, UQ_PUSH);
		copy_at_driver(q, p);
		return;
	}
	p->pos += p->len;
	req_serve(q, p);
}

static void failed(struct uq_queue *q, struct uq_piece *p, int32_t res)
{
	struct uq_io *io = &q->ios[p->tag];

	if (!io->error)
		io->error = res;
	req_serve(q, p);
}

/* -- where the bytes live -------------------------------------------------- */

/* The ops that have a place, as the map counts them. */
static inline enum um_op map_op(uint32_t op)
{
	switch (op) {
	case UBLK_IO_OP_READ:
		return UM_READ;
	case UBLK_IO_OP_WRITE:
		return UM_WRITE;
	case UBLK_IO_OP_DISCARD:
		return UM_DISCARD;
	default:
		return UM_WRITE_ZEROES;
	}
}

/* What a FLUSH does about the file number pos of those that it is about. */
static void look_up_flush(const struct um_flush *flush, const struct uq_piece *p,
			  struct um_hit *hit)
{
	*hit = (struct um_hit){ .kind = flush->kind, .end = p->end };
	if (flush->kind != UM_FILE)
		return;
	if (p->pos < flush->nr) {
		hit->slot = flush->slots[p->pos];
		hit->end = p->pos + 1;
	} else {
		hit->kind = UM_NULL; /* there were more when it came */
	}
}

/* Its end is counted from the request's start. */
static void look_up(const struct uq_queue *q, const struct uq_piece *p,
		    struct um_hit *hit)
{
	const struct ublksrv_io_desc *iod = &q->iods[p->tag];
	uint64_t start = iod->start_sector << SECTOR_SHIFT;

	if (iod_op(iod) == UBLK_IO_OP_FLUSH) {
		look_up_flush(q->view->flush, p, hit);
		return;
	}
	um_lookup(q->view, start + p->pos, map_op(iod_op(iod)), hit);
	hit->end -= start;
	if (hit->end > p->end)
		hit->end = p->end;
}

/* A spare piece for what follows the first len bytes; NULL if there is none. */
static struct uq_piece *split(struct uq_queue *q, struct uq_piece *p)
{
	struct uq_piece *rest;

	if (p->pos + p->len == p->end || q->free_piece < 0)
		return NULL;
	rest = &q->pieces[q->free_piece];
	q->free_piece = rest->next;
	rest->tag = p->tag;
	rest->pos = p->pos + p->len;
	rest->end = p->end;
	p->end = rest->pos;
	q->ios[p->tag].pending++;
	return rest;
}

static void drop_piece(struct uq_queue *q, struct uq_piece *p)
{
	int32_t nr = (int32_t)(p - q->pieces);

	q->ios[p->tag].pending--;
	if (nr < q->opt.depth)
		return;
	p->next = q->free_piece;
	q->free_piece = nr;
}

/*
 * Sees to [pos, end) of a piece: answers what can be answered at once, and sends
 * the rest on its way, in as many pieces as there are places and spares. Without
 * a spare, it goes on when its first place is through.
 */
void req_serve(struct uq_queue *q, struct uq_piece *p)
{
	uint16_t tag = p->tag;
	struct uq_io *io = &q->ios[tag];
	bool reads = iod_op(&q->iods[tag]) == UBLK_IO_OP_READ;

	while (p) {
		struct uq_piece *rest;
		struct um_hit hit;

		if (p->pos == p->end || io->error) {
			drop_piece(q, p);
			break;
		}
		look_up(q, p, &hit);
		p->kind = hit.kind;
		p->len = hit.end - p->pos;
		switch ((enum um_kind)hit.kind) {
		case UM_ERROR:
			io->error = hit.error;
			continue;
		case UM_NULL:
			p->pos = hit.end;
			continue;
		case UM_ZERO:
			if (reads)
				memset(tag_buf(q, tag) + p->pos, 0, p->len);
			if (reads && copies(q, p))
				break;
			p->pos = hit.end;
			continue;
		default:
			break;
		}
		p->slot = hit.slot;
		p->offset = hit.offset;
		p->mode = q->iods[tag].op_flags & UBLK_IO_F_NOUNMAP ? ZERO :
								      PUNCH;
		rest = split(q, p);
		if (hit.kind == UM_ZERO)
			acted(q, p);
		else
			launch(q, p);
		p = rest;
	}
	if (!io->pending)
		commit_result(q, tag);
}

/* -- the beginning --------------------------------------------------------- */

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
	struct uq_piece *p = &q->pieces[tag];
	struct uq_io *io = &q->ios[tag];

	io->error = 0;
	io->pending = 1;
	io->way = UQ_IN_BUFFER;
	p->pos = 0;
	p->end = iod_bytes(iod);
	switch (iod_op(iod)) {
	case UBLK_IO_OP_READ:
	case UBLK_IO_OP_WRITE:
		if (p->end > q->opt.buf_bytes)
			io->error = -EIO;
		io->way = way(q, iod);
		break;
	case UBLK_IO_OP_FLUSH:
		p->end = q->view->flush->kind == UM_FILE ? q->view->flush->nr :
							   1;
		break;
	case UBLK_IO_OP_DISCARD:
	case UBLK_IO_OP_WRITE_ZEROES:
		break;
	default:
		io->error = -EOPNOTSUPP;
	}
	req_serve(q, p);
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

/* -- completions ----------------------------------------------------------- */

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
	uint16_t mode = 0;

	if (moves_data(iod_op(iod)))
		res = count(p, res);
	else if (iod_op(iod) == UBLK_IO_OP_WRITE_ZEROES)
		mode = next_zero_mode(iod, p->mode, res);
	if (mode || (!res && moves_data(iod_op(iod)))) {
		p->mode = mode;
		submit_piece(q, p);
	} else if (res < 0) {
		failed(q, p, res);
	} else {
		acted(q, p);
	}
}

static void copy_done(struct uq_queue *q, struct uq_piece *p, int32_t res)
{
	res = count(p, res);
	if (!res) {
		copy_at_driver(q, p);
	} else if (res < 0) {
		failed(q, p, res);
	} else if (p->step == UQ_PULL) {
		act(q, p);
	} else {
		p->pos += p->len;
		req_serve(q, p);
	}
}

static void got_data(struct uq_queue *q, uint16_t tag, int32_t res)
{
	if (res == UBLK_IO_RES_OK)
		begin(q, tag);
	else if (res == UBLK_IO_RES_ABORT)
		q->live--;
	else
		q->failed = res < 0 ? res : -EPROTO;
}

void req_piece_done(struct uq_queue *q, uint32_t nr, int32_t res)
{
	struct uq_piece *p = &q->pieces[nr];
	bool again = (res == -EINTR || res == -EAGAIN) &&
		     p->retries < MAX_RETRIES;

	switch ((enum uq_step)p->step) {
	case UQ_BACKING:
		if (!again) {
			backing_done(q, p, res);
			break;
		}
		p->retries++;
		submit_piece(q, p);
		break;
	case UQ_PULL:
	case UQ_PUSH:
		if (!again) {
			copy_done(q, p, res);
			break;
		}
		p->retries++;
		copy_at_driver(q, p);
		break;
	case UQ_GET:
		got_data(q, p->tag, res);
		break;
	case UQ_ASKED: /* it has no SQE */
		break;
	}
}

/* Python's answer to an upcall. */
void req_answered(struct uq_queue *q, struct uq_piece *p, int32_t res)
{
	if (res < 0)
		failed(q, p, res);
	else
		acted(q, p);
}
