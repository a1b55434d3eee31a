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

/* For Python, which logs it. */
static void note_error(struct uq_queue *q, const struct ublksrv_io_desc *iod,
		       struct uq_io *io)
{
	q->errors++;
	q->injected += io->injected;
	io->injected = false;
	q->error_op = iod_op(iod);
	q->error_res = io->error;
	q->error_sector = iod->start_sector;
	/* The 1st, 2nd, 4th, 8th ...: a failing disk must not flood the log. */
	if (!(q->errors & (q->errors - 1)))
		q->report = true;
}

/* -- from step to step ----------------------------------------------------- */

static void serve(struct uq_queue *q, const struct ublksrv_io_desc *iod,
		  struct uq_piece *p);

/* A step has ended, in a place that the map may no longer have. */
static inline void leave(struct uq_queue *q, struct uq_piece *p)
{
	if (__builtin_expect(p->drains, 0))
		drain_leave(q, p);
}

/* To the next leg, or behind the last one to the next place. */
static inline void advance(struct uq_piece *p)
{
	if (__builtin_expect(p->legs, 0) && ++p->leg < p->legs) {
		p->slot++;
		return;
	}
	p->leg = p->legs = 0;
	p->pos += p->len;
}

static inline void go_on(struct uq_queue *q, const struct ublksrv_io_desc *iod,
			 struct uq_piece *p)
{
	leave(q, p);
	advance(p);
	serve(q, iod, p);
}

static void ask(struct uq_queue *q, struct uq_piece *p, enum uq_step step)
{
	int32_t nr = (int32_t)(p - q->pieces);

	leave(q, p);
	begin_step(p, step);
	q->upcalls++;
	p->next = -1;
	if (q->asked < 0)
		q->asked = nr;
	else
		q->pieces[q->last_asked].next = nr;
	q->last_asked = nr;
}

/* What a file that may wait, or Python, does about it; the data of a WRITE is there. */
static void act(struct uq_queue *q, const struct ublksrv_io_desc *iod,
		struct uq_piece *p)
{
	if (p->kind == UM_FILE) {
		begin_step(p, UQ_BACKING);
		back_submit(q, iod, p);
	} else {
		ask(q, p, UQ_ASKED);
	}
}

/* The file that a piece is in has failed, which Python wants to know. */
static void ask_why(struct uq_queue *q, struct uq_piece *p, int32_t res)
{
	ask(q, p, UQ_ASKED_FAILED);
	p->error = (uint16_t)-res;
}

static void failed(struct uq_queue *q, const struct ublksrv_io_desc *iod,
		   struct uq_piece *p, int32_t res)
{
	struct uq_io *io = &q->ios[p->tag];

	leave(q, p);
	if (!io->error)
		io->error = res;
	serve(q, iod, p);
}

static inline void launch(struct uq_queue *q,
			  const struct ublksrv_io_desc *iod, struct uq_piece *p)
{
	int32_t res = data_in(q, iod, p);

	if (__builtin_expect(res, 0))
		failed(q, iod, p, res);
	else
		act(q, iod, p);
}

/* The len bytes are through, and the data of a READ is here. */
static void acted(struct uq_queue *q, const struct ublksrv_io_desc *iod,
		  struct uq_piece *p)
{
	int32_t res = data_out(q, iod, p);

	if (__builtin_expect(res, 0))
		failed(q, iod, p, res);
	else
		go_on(q, iod, p);
}

/* -- in pieces ------------------------------------------------------------- */

/*
 * A spare piece for the legs that follow, if it goes by these, or for what
 * follows the first len bytes; NULL if there is none.
 */
static struct uq_piece *split(struct uq_queue *q, struct uq_piece *p,
			      bool by_legs)
{
	bool has_legs = by_legs && p->leg + 1 < p->legs;
	struct uq_piece *rest;

	if ((p->pos + p->len == p->end && !has_legs) || q->free_piece < 0)
		return NULL;
	rest = &q->pieces[q->free_piece];
	q->free_piece = rest->next;
	rest->tag = p->tag;
	rest->pos = has_legs ? p->pos : p->pos + p->len;
	rest->end = p->end;
	rest->spared = p->spared;
	p->end = p->pos + p->len;
	if (has_legs) {
		rest->leg = p->leg + 1;
		rest->legs = p->legs;
		rest->slot = p->slot + 1;
		p->legs = rest->leg;
	}
	q->ios[p->tag].pending++;
	return rest;
}

static void drop_piece(struct uq_queue *q, struct uq_piece *p)
{
	int32_t nr = (int32_t)(p - q->pieces);

	p->step = UQ_IDLE;
	p->leg = p->legs = 0;
	q->ios[p->tag].pending--;
	if (nr < q->opt.depth)
		return;
	p->next = q->free_piece;
	q->free_piece = nr;
}

/* What memory of ours has to do with it, where the data comes in a buffer. */
static void use_memory(struct uq_queue *q, const struct ublksrv_io_desc *iod,
		       struct uq_piece *p)
{
	uint32_t op = iod_op(iod);
	unsigned char *mem = piece_buf(q, p);
	unsigned char *buf = q->ios[p->tag].buf + p->pos;

	if (!moves_data(op))
		memset(mem, 0, p->len);
	else if (op == UBLK_IO_OP_WRITE)
		memmove(mem, buf, p->len);
	else if (q->opt.data == UQ_GET_DATA && p->len == iod_bytes(iod))
		q->ios[p->tag].buf = mem; /* the driver takes it from there */
	else
		memmove(buf, mem, p->len);
}

/* A READ or WRITE of a file, with the data copied on the way where need be. */
static int32_t use_file(struct uq_queue *q, const struct ublksrv_io_desc *iod,
			struct uq_piece *p)
{
	int32_t res = data_in(q, iod, p);

	if (!res)
		res = back_at_once(q, iod, p);
	return res ? res : data_out(q, iod, p);
}

/* Whether that was all. An error is one of the request. */
static inline bool serve_at_once(struct uq_queue *q,
				 const struct ublksrv_io_desc *iod,
				 struct uq_piece *p)
{
	struct uq_io *io = &q->ios[p->tag];
	uint32_t op = iod_op(iod);

	switch ((enum um_kind)p->kind) {
	case UM_NULL:
		return true;
	case UM_ZERO:
		if (op != UBLK_IO_OP_READ)
			return true;
		memset(piece_buf(q, p), 0, p->len);
		io->error = data_out(q, iod, p);
		return true;
	case UM_PATTERN:
		io->error = pattern_serve(q, iod, p);
		return true;
	case UM_MEMORY:
		if (moves_data(op) && copies(q, p))
			io->error = data_copy(q, p, op == UBLK_IO_OP_READ);
		else
			use_memory(q, iod, p);
		return true;
	case UM_FILE:
		if (!q->view->files[p->slot].in_memory || !moves_data(op) ||
		    io->way > UQ_COPIED)
			return false;
		io->error = use_file(q, iod, p);
		return true;
	default:
		return false;
	}
}

/*
 * The only place where results are made. A short count would be taken for
 * success by Linux 7.3, so it is all bytes or an errno; ops without data
 * answer 0.
 */
static inline void commit(struct uq_queue *q, const struct ublksrv_io_desc *iod,
			  uint16_t tag)
{
	struct uq_io *io = &q->ios[tag];
	const uint32_t op = iod_op(iod);
	int32_t res = moves_data(op) ? (int32_t)iod_bytes(iod) :
				       zone_result(q, iod);

	if (__builtin_expect(io->error, 0)) {
		res = io->error;
		note_error(q, iod, io);
	}
	if (io->way == UQ_REGISTERED)
		data_unregister(q, tag);
	drv_commit(q, tag, res);
	if (__builtin_expect(is_zone_op(op), 0))
		io->append_sector = 0;
}

/*
 * Sees to [pos, end) of a piece: answers what can be answered at once, and sends
 * the rest on its way, in as many pieces as there are places and spares. Without
 * a spare, it goes on when its first place is through.
 */
static void serve(struct uq_queue *q, const struct ublksrv_io_desc *iod,
		  struct uq_piece *p)
{
	uint16_t tag = p->tag;
	struct uq_io *io = &q->ios[tag];

	while (p->pos != p->end && !io->error) {
		int32_t res = place_find(q, iod, p);
		struct uq_piece *rest;

		if (__builtin_expect(res, 0)) {
			if (res <= -UM_FIRST_FAULT) {
				res = fault_befall(q, p, res);
				p->spared = p->pos + p->len;
			}
			if (res < 0) {
				io->error = res;
				break;
			}
		}
		if (!res && __builtin_expect(!p->width, 0)) {
			advance(p); /* none of it is in this leg */
			continue;
		}
		if (!res && serve_at_once(q, iod, p)) {
			if (__builtin_expect(io->error && p->asks, 0)) {
				ask_why(q, p, io->error);
				io->error = 0;
				return;
			}
			advance(p);
			continue;
		}
		rest = split(q, p, !res);
		if (!res)
			launch(q, iod, p);
		if (!rest)
			return;
		p = rest;
	}
	drop_piece(q, p);
	if (!io->pending)
		commit(q, iod, tag);
}

/* -- the beginning --------------------------------------------------------- */

static void begin_zone_op(struct uq_queue *q,
			  const struct ublksrv_io_desc *iod, struct uq_piece *p)
{
	struct uq_io *io = &q->ios[p->tag];

	io->error = zone_begin(q, iod, p);
	if (io->error)
		serve(q, iod, p);
	else
		ask(q, p, UQ_ASKED);
}

static void begin_without_data(struct uq_queue *q,
			       const struct ublksrv_io_desc *iod,
			       struct uq_piece *p)
{
	switch (iod_op(iod)) {
	case UBLK_IO_OP_FLUSH:
		p->end = q->view->nr_spaces * UQ_FLUSH_STEPS;
		break;
	case UBLK_IO_OP_DISCARD:
	case UBLK_IO_OP_WRITE_ZEROES:
		break;
	default:
		q->ios[p->tag].error = -EOPNOTSUPP;
	}
	serve(q, iod, p);
}

/*
 * The descriptor is there, and the data as far as the driver brings it. Most are
 * in one place as a whole.
 */
static void begin(struct uq_queue *q, uint16_t tag)
{
	const struct ublksrv_io_desc *iod = iod_of(q, tag);
	uint64_t start = iod->start_sector << SECTOR_SHIFT;
	struct uq_piece *p = &q->pieces[tag];
	struct uq_io *io = &q->ios[tag];
	uint64_t bytes = iod_bytes(iod);
	struct um_hit hit;

	p->pos = 0;
	p->end = (uint32_t)bytes;
	p->spared = 0;
	p->space = 0;
	p->at = start;
	io->pending = 1;
	io->way = UQ_IN_BUFFER;
	if (!moves_data(iod_op(iod))) {
		if (is_zone_op(iod_op(iod)))
			begin_zone_op(q, iod, p);
		else
			begin_without_data(q, iod, p);
		return;
	}
	io->way = data_way(q, iod, io);
	if (bytes > q->opt.buf_bytes)
		io->error = -EIO;
	if (__builtin_expect(iod->op_flags & UBLK_IO_F_INTEGRITY, 0)) {
		if (!io->error)
			io->error = meta_start(q, iod, tag);
		serve(q, iod, p);
		return;
	}
	um_lookup(q->view, start, (enum um_op)iod_op(iod), &hit);
	if (hit.end - start < bytes || hit.error || hit.asks || io->error) {
		serve(q, iod, p);
		return;
	}
	if (hit.kind == UM_NULL) {
		drv_commit(q, tag, (int32_t)bytes);
		return;
	}
	p->kind = hit.kind;
	p->asks = false;
	p->slot = hit.slot;
	p->space = hit.space;
	p->at = hit.at;
	p->offset = hit.offset;
	p->len = (uint32_t)bytes;
	if (serve_at_once(q, iod, p))
		commit(q, iod, tag);
	else
		launch(q, iod, p);
}

/*
 * Takes the data of a WRITE that the driver offers: to where it belongs, if that
 * is in one place of our memory; to where Python wants it, if it is to be asked;
 * or to the tag's buffer, also where it fails, or may do so.
 */
static void take_data(struct uq_queue *q, uint16_t tag)
{
	const struct ublksrv_io_desc *iod = iod_of(q, tag);
	struct uq_piece *p = &q->pieces[tag];

	p->pos = 0;
	p->end = (uint32_t)iod_bytes(iod);
	if (!place_find(q, iod, p) && p->len == p->end) {
		if (p->kind == UM_UPCALL_EARLY) {
			ask(q, p, UQ_ASKED_EARLY);
			return;
		}
		if (p->kind == UM_MEMORY)
			q->ios[tag].buf = piece_buf(q, p);
	}
	data_get(q, tag);
}

void req_start(struct uq_queue *q, uint16_t tag, bool wants_data)
{
	q->ios[tag].error = 0;
	q->ios[tag].buf = tag_buf(q, tag);
	if (wants_data)
		take_data(q, tag);
	else
		begin(q, tag);
}

/* -- completions ----------------------------------------------------------- */

static void got_data(struct uq_queue *q, uint16_t tag, int32_t res)
{
	struct uq_piece *p = &q->pieces[tag];

	p->step = UQ_IDLE;
	/* It may not stay where it was put, in memory that others wait for. */
	if (p->drains && p->kind == UM_MEMORY) {
		memcpy(tag_buf(q, tag), q->ios[tag].buf, p->len);
		q->ios[tag].buf = tag_buf(q, tag);
	}
	leave(q, p);
	if (res == UBLK_IO_RES_OK)
		begin(q, tag);
	else if (res == UBLK_IO_RES_ABORT)
		q->live--;
	else
		q->failed = res < 0 ? res : -EPROTO;
}

static void backing_done(struct uq_queue *q, struct uq_piece *p, int32_t res)
{
	const struct ublksrv_io_desc *iod = iod_of(q, p->tag);

	res = back_done(q, iod, p, res);
	if (__builtin_expect(res < 0 && p->asks, 0))
		ask_why(q, p, res);
	else if (res < 0)
		failed(q, iod, p, res);
	else if (res)
		acted(q, iod, p);
}

/* No further fault befalls what its fault was about, wherever that is now. */
static void see_to_spared(struct uq_queue *q,
			  const struct ublksrv_io_desc *iod, struct uq_piece *p)
{
	p->spared = p->pos + p->len;
	serve(q, iod, p);
}

static void delay_over(struct uq_queue *q, struct uq_piece *p)
{
	const struct ublksrv_io_desc *iod = iod_of(q, p->tag);

	if (!p->error) {
		see_to_spared(q, iod, p);
		return;
	}
	if (!q->ios[p->tag].error)
		q->ios[p->tag].injected = true;
	failed(q, iod, p, -(int32_t)p->error);
}

void req_part_done(struct uq_queue *q, uint16_t tag, int32_t res)
{
	struct uq_io *io = &q->ios[tag];

	if (res < 0 && !io->error)
		io->error = res;
	if (!--io->pending)
		commit(q, iod_of(q, tag), tag);
}

void req_piece_done(struct uq_queue *q, uint32_t nr, int32_t res)
{
	struct uq_piece *p = &q->pieces[nr];

	switch ((enum uq_step)p->step) {
	case UQ_BACKING:
		if (try_again(p, res))
			back_submit(q, iod_of(q, p->tag), p);
		else
			backing_done(q, p, res);
		break;
	case UQ_GET:
		got_data(q, p->tag, res);
		break;
	case UQ_DELAYED:
		delay_over(q, p);
		break;
	case UQ_IDLE:
	case UQ_ASKED:
	case UQ_ASKED_EARLY:
	case UQ_ASKED_FAILED: /* they have no SQE */
		break;
	}
}

/* -- Python's answers ------------------------------------------------------ */

/*
 * The driver takes no result for a WRITE whose data it offers before that is
 * taken, whatever the result.
 */
void req_answered(struct uq_queue *q, struct uq_piece *p, int32_t res)
{
	const struct ublksrv_io_desc *iod = iod_of(q, p->tag);

	if (p->step == UQ_ASKED_EARLY) {
		q->ios[p->tag].error = res;
		data_get(q, p->tag);
		return;
	}
	if (!res && p->step == UQ_ASKED_FAILED)
		res = -EIO; /* it is not done */
	if (!res && is_zone_op(iod_op(iod)))
		res = zone_answered(q, iod, p);
	if (res < 0)
		failed(q, iod, p, res);
	else
		acted(q, iod, p);
}

void req_retry(struct uq_queue *q, struct uq_piece *p)
{
	p->leg = p->legs = 0; /* from the first on, whatever the map says */
	if (p->step == UQ_ASKED_EARLY)
		take_data(q, p->tag);
	else if (is_zone_op(iod_op(iod_of(q, p->tag))))
		ask(q, p, UQ_ASKED);
	else
		see_to_spared(q, iod_of(q, p->tag), p);
}
