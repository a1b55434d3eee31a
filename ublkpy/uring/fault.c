// SPDX-License-Identifier: MIT
/*
 * What befalls a request, where the map says so, before anything is done about
 * it: a delay, by the ring's clock, and then an error, by chance.
 *
 * Both are drawn when it is looked up, so that a load which comes in the same
 * order fails in the same places, whatever the delays.
 */
#define _GNU_SOURCE
#include "engine.h"

#include <math.h>
#include <unistd.h>

#define NS_PER_S	1000000000

/* SplitMix64 (Steele, Lea and Flood, 2014). */
#define STEP		0x9e3779b97f4a7c15ULL

static uint64_t mix(uint64_t x)
{
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ x >> 27) * 0x94d049bb133111ebULL;
	return x ^ x >> 31;
}

/* From 0 up to, and not, 1: a row of its own for each seed and thread. */
static double draw(struct uq_queue *q, const struct um_fault *fault)
{
	uint64_t thread = (uint64_t)q->opt.q_id << 16 | q->opt.thread;
	uint64_t row = mix(mix(fault->seed + STEP) ^ thread);

	return (double)(mix(row + ++q->drawn * STEP) >> 11) * 0x1p-53;
}

static uint64_t draw_delay(struct uq_queue *q, const struct um_fault *fault)
{
	double mean = (double)fault->delay, ns;

	switch ((enum um_distribution)fault->distribution) {
	case UM_UNIFORM:
		ns = 2 * mean * draw(q, fault);
		break;
	case UM_EXPONENTIAL:
		ns = -mean * log(1 - draw(q, fault));
		break;
	default:
		return fault->delay;
	}
	return ns < UM_MAX_DELAY ? (uint64_t)ns : UM_MAX_DELAY;
}

static void send_off(struct uq_queue *q, struct uq_piece *p, uint64_t ns,
		     uint16_t error)
{
	struct io_uring_sqe *sqe = new_sqe(q);

	begin_step(p, UQ_DELAYED);
	p->error = error;
	p->delay = (struct __kernel_timespec){ (int64_t)(ns / NS_PER_S),
					       (int64_t)(ns % NS_PER_S) };
	sqe->opcode = IORING_OP_TIMEOUT;
	sqe->flags = 0;
	sqe->fd = -1;
	sqe->addr = (uint64_t)(uintptr_t)&p->delay;
	sqe->len = 1;
	sqe->user_data = piece_data(q, p);
}

int32_t fault_befall(struct uq_queue *q, struct uq_piece *p, int32_t error)
{
	const struct um_fault *fault = &q->view->faults[-error - UM_FIRST_FAULT];
	uint16_t result = 0;
	uint64_t ns = 0;

	if (p->pos < p->spared ||
	    (fault->path && access(fault->path, F_OK)))
		return 0;
	if (fault->delay)
		ns = draw_delay(q, fault);
	if (fault->error_rate > 0 && draw(q, fault) < fault->error_rate)
		result = fault->error;
	if (ns) {
		send_off(q, p, ns, result);
		return 1;
	}
	q->ios[p->tag].injected = !!result;
	return -(int32_t)result;
}
