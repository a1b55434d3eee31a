// SPDX-License-Identifier: MIT
/*
 * Whoever changes the map may have to wait for what is still on its way to the
 * old places (um_drain()). He wakes the queue, which marks the pieces in flight
 * there, and says so when the last of them has left. New ones do not count: they
 * go by the new map.
 */
#define _GNU_SOURCE
#include "engine.h"

#include <poll.h>
#include <unistd.h>

#define POLL32_SHIFT	(__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? 16 : 0)

void drain_listen(struct uq_queue *q)
{
	struct io_uring_sqe *sqe = new_sqe(q);

	sqe->flags = 0;
	sqe->opcode = IORING_OP_POLL_ADD;
	sqe->fd = q->wake_fd;
	sqe->poll32_events = POLLIN << POLL32_SHIFT;
	sqe->user_data = user_data(FROM_WAKE, 0);
}

/* A FLUSH has no place. */
static bool is_inside(const struct uq_queue *q, const struct uq_piece *p,
		      const struct um_drain *drain)
{
	const struct ublksrv_io_desc *iod = iod_of(q, p->tag);
	uint64_t pos = (iod->start_sector << SECTOR_SHIFT) + p->pos;

	switch ((enum uq_step)p->step) {
	case UQ_BACKING:
	case UQ_GET:
		return iod_op(iod) != UBLK_IO_OP_FLUSH && pos < drain->end &&
		       pos + p->len > drain->start;
	default:
		return false;
	}
}

void drain_begin(struct uq_queue *q)
{
	struct um_drain drain;
	uint64_t woken;

	/* In this order: whoever comes in between wakes us again. */
	if (read(q->wake_fd, &woken, sizeof(woken)) < 0 && errno != EAGAIN)
		q->failed = -errno;
	drain = um_last_drain(&q->reader);
	drain_listen(q);
	if (drain.nr == q->drain_nr)
		return; /* Python woke us */
	q->draining = true;
	q->drain_nr = drain.nr;
	q->drain_left = 0;
	for (uint32_t nr = 0; nr < q->nr_pieces; nr++) {
		struct uq_piece *p = &q->pieces[nr];

		p->drains = is_inside(q, p, &drain);
		q->drain_left += p->drains;
	}
}

void drain_leave(struct uq_queue *q, struct uq_piece *p)
{
	p->drains = false;
	q->drain_left--;
}

void drain_end(struct uq_queue *q)
{
	/* First what the driver is to take from there, while it is submitted. */
	ur_submit_and_wait(&q->ring, 0);
	q->draining = false;
	um_drained(&q->reader, q->drain_nr);
}
