// SPDX-License-Identifier: MIT
/*
 * What Python is asked, and what it says. Requests go out together, when
 * uq_run() returns; results come back with its next call, or one by one later.
 */
#define _GNU_SOURCE
#include "engine.h"

#include <unistd.h>

static void say_where(const struct uq_queue *q, const struct uq_piece *p,
		      struct uq_upcall *call)
{
	const unsigned char *buf = q->ios[p->tag].buf;

	if (buf == tag_buf(q, p->tag)) {
		call->place = (uint64_t)(buf - q->bufs) + p->pos;
	} else {
		call->place = (uint64_t)(uintptr_t)(buf + p->pos);
		call->what |= UQ_IS_ELSEWHERE;
	}
}

static void describe(const struct uq_queue *q, const struct uq_piece *p,
		     struct uq_upcall *call)
{
	const struct ublksrv_io_desc *iod = iod_of(q, p->tag);
	const uint32_t op = iod_op(iod);

	*call = (struct uq_upcall){
		.what = op | (uint32_t)p->space << UQ_SPACE_SHIFT,
		.piece = (uint32_t)(p - q->pieces),
		.flags = iod->op_flags & ~0xffU,
	};
	if (op != UBLK_IO_OP_FLUSH) {
		call->pos = p->at;
		call->len = p->len;
	}
	if (iod->op_flags & UBLK_IO_F_FUA)
		call->what |= UQ_IS_FUA;
	if (p->step == UQ_ASKED_FAILED) {
		call->what |= UQ_HAS_FAILED;
		call->error = p->error;
		call->slot = p->slot;
	} else if (p->step == UQ_ASKED_EARLY)
		call->what |= UQ_IS_EARLY;
	else if (call->len && (moves_data(op) || is_zone_op(op)))
		say_where(q, p, call);
}

void up_ask(struct uq_queue *q)
{
	while (q->asked >= 0) {
		const struct uq_piece *p = &q->pieces[q->asked];

		describe(q, p, &q->calls[q->nr_calls]);
		/* Of what Python forgets, nobody knows that it is done. */
		q->results[q->nr_calls++] = -EIO;
		q->asked = p->next;
	}
}

void up_take_results(struct uq_queue *q)
{
	const uint32_t nr = q->nr_calls;

	q->nr_calls = 0;
	look_at_map(q);
	for (uint32_t i = 0; i < nr; i++)
		if (q->results[i] != UQ_LATER)
			req_answered(q, &q->pieces[q->calls[i].piece],
				     q->results[i]);
	look_away(q);
}

static void set_all(struct uq_queue *q, int32_t result)
{
	for (uint32_t i = 0; i < q->nr_calls; i++)
		q->results[i] = result;
}

void uq_done(struct uq_queue *q)
{
	set_all(q, 0);
}

void uq_defer(struct uq_queue *q)
{
	set_all(q, UQ_LATER);
}

void uq_answer(struct uq_queue *q, uint32_t piece, int32_t res)
{
	look_at_map(q);
	req_answered(q, &q->pieces[piece], res);
	look_away(q);
}

void uq_retry(struct uq_queue *q, uint32_t piece)
{
	look_at_map(q);
	req_retry(q, &q->pieces[piece]);
	look_away(q);
}

void uq_receive(struct uq_queue *q, uint32_t piece, void *buf)
{
	uint16_t tag = q->pieces[piece].tag;

	q->ios[tag].buf = buf;
	data_get(q, tag);
}

int uq_wake(struct uq_queue *q)
{
	const uint64_t one = 1;

	return write(q->wake_fd, &one, sizeof(one)) < 0 && errno != EAGAIN ?
		       -errno : 0;
}
