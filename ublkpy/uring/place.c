// SPDX-License-Identifier: MIT
/*
 * Where the next bytes of a request are, by the map.
 */
#define _GNU_SOURCE
#include "engine.h"

/* The ops that have a place, as the map counts them. */
static inline enum um_op map_op(uint32_t op)
{
	_Static_assert(UBLK_IO_OP_READ == (int)UM_READ &&
		       UBLK_IO_OP_WRITE == (int)UM_WRITE, "one numbering");
	if (moves_data(op))
		return (enum um_op)op;
	return op == UBLK_IO_OP_DISCARD ? UM_DISCARD : UM_WRITE_ZEROES;
}

/*
 * The next file that a FLUSH is about, space by space. In each they go by their
 * slots: those that the map gets meanwhile come last, so that none is left out
 * that was there.
 */
static void look_up_flush(const struct um_view *view, const struct uq_piece *p,
			  struct um_hit *hit)
{
	uint16_t space = (uint16_t)(p->pos / UQ_FLUSH_STEPS), i = 0;
	const struct um_flush *flush = view->spaces[space].flush;
	uint32_t first = space * UQ_FLUSH_STEPS;

	*hit = (struct um_hit){ .kind = flush->kind,
				.end = first + UQ_FLUSH_STEPS,
				.asks = flush->asks,
				.space = space };
	/* It is one request, of however many files. */
	if (p->pos == first)
		hit->error = -(int32_t)flush->error;
	if (flush->kind != UM_FILE)
		return;
	while (i < flush->nr && first + flush->slots[i] < p->pos)
		i++;
	if (i == flush->nr || first + flush->slots[i] >= p->end) {
		hit->kind = UM_NULL;
		return;
	}
	hit->slot = flush->slots[i];
	if (i + 1U < flush->nr)
		hit->end = first + hit->slot + 1;
}

/*
 * The place in one of several files. When the map has got other ones since the
 * first, they all get it.
 */
static void look_up_leg(struct uq_piece *p, const struct um_hit *hit)
{
	struct um_part part;

	if (p->legs != hit->nr_legs || p->slot != hit->slot + p->leg)
		p->leg = 0;
	p->legs = hit->nr_legs;
	part = um_leg(hit, p->len, p->leg);
	p->slot = hit->slot + p->leg;
	p->offset = part.offset;
	p->width = (uint32_t)part.len;
}

int32_t place_find(const struct uq_queue *q, const struct ublksrv_io_desc *iod,
		   struct uq_piece *p)
{
	uint64_t start = iod->start_sector << SECTOR_SHIFT;
	struct um_hit hit;

	if (__builtin_expect(iod_op(iod) == UBLK_IO_OP_FLUSH, 0)) {
		look_up_flush(q->view, p, &hit);
	} else {
		um_lookup(q->view, start + p->pos, map_op(iod_op(iod)), &hit);
		hit.end -= start;
	}
	p->kind = hit.kind;
	p->asks = hit.asks;
	p->space = hit.space;
	p->at = hit.at;
	p->len = (hit.end < p->end ? (uint32_t)hit.end : p->end) - p->pos;
	if (__builtin_expect(hit.nr_legs, 0)) {
		look_up_leg(p, &hit);
		return hit.error;
	}
	p->leg = p->legs = 0;
	p->slot = hit.slot;
	p->offset = hit.offset;
	p->width = p->len;
	return hit.error;
}
