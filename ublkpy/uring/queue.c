// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "engine.h"

#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* A request that crosses borders is served in several pieces at a time. */
#define SPARE_PIECES(depth)	((uint32_t)(depth) + 64)

static void start_batch(struct uq_queue *q, const struct io_uring_cqe *cqe)
{
	uint32_t nr;
	const uint16_t *tags = drv_fetched(q, cqe, &nr);

	for (uint32_t i = 0; i < nr; i++)
		req_start(q, tags[i], false);
	drv_fetch_again(q, cqe);
}

static void handle_cqe(struct uq_queue *q, const struct io_uring_cqe *cqe)
{
	uint32_t nr = (uint32_t)cqe->user_data;

	switch ((enum uq_from)(cqe->user_data >> FROM_SHIFT)) {
	case FROM_PIECE:
		req_piece_done(q, nr, cqe->res);
		break;
	case FROM_TAG:
		if (drv_tag_done(q, cqe->res))
			req_start(q, (uint16_t)nr,
				  cqe->res == UBLK_IO_RES_NEED_GET_DATA);
		break;
	case FROM_BATCH_FETCH:
		start_batch(q, cqe);
		break;
	case FROM_BATCH_COMMIT:
		drv_committed(q, nr, cqe->res);
		break;
	case FROM_WAKE:
		drain_begin(q);
		break;
	case FROM_METADATA:
		meta_done(q, (uint16_t)nr, cqe->res);
		break;
	case FROM_NOBODY: /* whoever needed it fails in his turn */
		break;
	}
}

/* What the map says is good from here until look_away(). */
static inline void look_at_map(struct uq_queue *q)
{
	um_reader_enter(&q->reader);
	q->view = um_current(q->map);
}

static inline void look_away(struct uq_queue *q)
{
	q->view = NULL;
	um_reader_leave(&q->reader);
}

static inline unsigned int to_wait_for(const struct uq_queue *q)
{
	/* Python has answered in a way that brings no completion. */
	if (q->asked >= 0 || q->report)
		return 0;
	/* Without a fetch, nothing else need come. */
	return 1 + (q->live ? q->expected : 0);
}

/*
 * While Python takes its time, what is done is done: results, and what several
 * threads in batch mode leave to each other (fetch_batches()).
 */
static void send_all(struct uq_queue *q)
{
	drv_send(q);
	if (q->draining && !q->drain_left)
		drain_end(q);
	if (ur_has_unsent(&q->ring))
		ur_submit_and_wait(&q->ring, 0);
}

int uq_run(struct uq_queue *q)
{
	const struct timespec pause = { .tv_nsec = 1000000 };

	while (q->live || q->in_hand) {
		unsigned int nr;
		int ret;

		drv_send(q);
		if (q->draining && !q->drain_left)
			drain_end(q);
		ret = ur_submit_and_wait(&q->ring, to_wait_for(q));
		q->expected = 0;
		nr = ur_cq_ready(&q->ring);
		if (ret < 0 && ret != -EINTR && ret != -EAGAIN && ret != -EBUSY)
			return ret;
		/* No memory for a request just now: let some come back. */
		if (ret == -EAGAIN && !nr)
			nanosleep(&pause, NULL);
		look_at_map(q);
		for (unsigned int i = 0; i < nr; i++)
			handle_cqe(q, ur_cqe(&q->ring, i));
		look_away(q);
		ur_cq_advance(&q->ring, nr);
		if (q->failed)
			return q->failed;
		if (q->asked >= 0) {
			send_all(q);
			return UQ_UPCALLS;
		}
		if (q->report) {
			q->report = false;
			return UQ_IO_ERROR;
		}
	}
	return UQ_STOPPED;
}

int uq_upcall(struct uq_queue *q, struct uq_upcall *upcall)
{
	const struct ublksrv_io_desc *iod;
	struct uq_piece *p;

	if (q->asked < 0)
		return 0;
	p = &q->pieces[q->asked];
	iod = iod_of(q, p->tag);
	*upcall = (struct uq_upcall){
		.piece = (uint32_t)q->asked,
		.op_flags = iod->op_flags,
		.early = p->step == UQ_ASKED_EARLY,
	};
	if (iod_op(iod) != UBLK_IO_OP_FLUSH) {
		upcall->pos = (iod->start_sector << SECTOR_SHIFT) + p->pos;
		upcall->len = p->len;
	}
	if (moves_data(iod_op(iod)) && !upcall->early)
		upcall->buf = piece_buf(q, p);
	q->asked = p->next;
	return 1;
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

static size_t round_up_page(size_t n)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);

	return (n + page - 1) / page * page;
}

/* Neither mapping may follow a fork: a child would pin the device. */
static int map_both(struct uq_memory *m, const struct uq_options *opt)
{
	size_t stride = round_up_page((size_t)UBLK_MAX_QUEUE_DEPTH *
				      opt->iod_bytes);
	size_t len = round_up_page((size_t)opt->depth * opt->iod_bytes);
	void *p;

	p = mmap(NULL, len, PROT_READ, MAP_SHARED | MAP_POPULATE, opt->cdev_fd,
		 (off_t)(opt->q_id * stride));
	if (p == MAP_FAILED)
		return -errno;
	m->iods = p;
	m->iods_len = len;
	if (madvise(p, len, MADV_DONTFORK))
		return -errno;

	len = (size_t)opt->depth * opt->buf_bytes;
	p = mmap(NULL, len, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED)
		return -errno;
	m->bufs = p;
	m->bufs_len = len;
	return madvise(p, len, MADV_DONTFORK) ? -errno : 0;
}

int uq_map_memory(struct uq_memory *m, const struct uq_options *opt)
{
	int ret;

	memset(m, 0, sizeof(*m));
	ret = map_both(m, opt);
	if (ret)
		uq_unmap_memory(m);
	return ret;
}

void uq_unmap_memory(struct uq_memory *m)
{
	if (m->iods)
		munmap((void *)(uintptr_t)m->iods, m->iods_len);
	if (m->bufs)
		munmap(m->bufs, m->bufs_len);
	m->iods = NULL;
	m->bufs = NULL;
}

static int make_tables(struct uq_queue *q)
{
	uint32_t depth = q->opt.depth, spares = SPARE_PIECES(depth);

	q->ios = calloc(depth, sizeof(*q->ios));
	q->pieces = aligned_alloc(64, (depth + spares) * sizeof(*q->pieces));
	if (!q->ios || !q->pieces)
		return -ENOMEM;
	memset(q->pieces, 0, (depth + spares) * sizeof(*q->pieces));
	for (uint32_t tag = 0; tag < depth; tag++) {
		q->pieces[tag].tag = (uint16_t)tag;
		q->ios[tag].buf = tag_buf(q, (uint16_t)tag);
	}
	q->nr_pieces = depth + spares;
	q->asked = -1;
	q->free_piece = -1;
	for (uint32_t nr = depth + spares; nr-- > depth;) {
		q->pieces[nr].next = q->free_piece;
		q->free_piece = (int32_t)nr;
	}
	return 0;
}

static uint32_t fixed_files(const struct um_view *view, int *fds)
{
	uint32_t nr = view->nr_files < MAX_FIXED ? view->nr_files : MAX_FIXED;

	for (uint32_t i = 0; i < nr; i++)
		fds[i] = view->files[i].fd;
	return nr;
}

static int init_ring(struct uq_queue *q)
{
	int fds[FIRST_FILE_SLOT + MAX_FIXED] = { [CDEV_SLOT] = q->opt.cdev_fd };
	/* At least a commit or a piece for each tag, and room for chains. */
	unsigned int entries = q->opt.depth < 8 ? 16 : 2U * q->opt.depth;
	int ret;

	/*
	 * A completion for each piece of data or metadata, for each tag or
	 * fetched batch of them, for batches of results, and for what is
	 * submitted while a round is handled: it never overflows, which a
	 * multishot fetch would not survive.
	 */
	ret = ur_ring_init(&q->ring, entries,
			   3U * q->opt.depth + SPARE_PIECES(q->opt.depth) +
				   2U * entries + 64,
			   IORING_SETUP_SINGLE_ISSUER |
			   IORING_SETUP_DEFER_TASKRUN |
			   IORING_SETUP_SUBMIT_ALL);
	if (ret)
		return ret;
	um_reader_enter(&q->reader);
	q->nr_fixed = fixed_files(um_current(q->map), fds + FIRST_FILE_SLOT);
	um_reader_leave(&q->reader);
	ret = ur_register_files(&q->ring, fds, FIRST_FILE_SLOT + q->nr_fixed);
	if (ret)
		return ret;
	return ur_register_ring_fd(&q->ring);
}

int uq_init(struct uq_queue *q, const struct uq_options *opt,
	    const struct uq_memory *memory, struct um_map *map)
{
	int ret;

	memset(q, 0, sizeof(*q));
	q->ring.fd = -1;
	q->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (q->wake_fd < 0)
		return -errno;
	q->opt = *opt;
	q->way = data_usual_way(opt->data);
	q->iods = memory->iods;
	q->bufs = memory->bufs;
	q->map = map;
	um_reader_add(map, &q->reader, q->wake_fd);
	ret = make_tables(q);
	if (!ret)
		ret = meta_init(q);
	if (!ret)
		ret = init_ring(q);
	if (!ret)
		ret = drv_init(q);
	if (!ret)
		ret = drv_start(q);
	if (ret)
		uq_exit(q);
	else
		drain_listen(q);
	return ret;
}

void uq_exit(struct uq_queue *q)
{
	ur_ring_exit(&q->ring);
	drv_exit(q);
	meta_exit(q);
	if (q->map) {
		um_reader_remove(&q->reader);
		close(q->wake_fd);
	}
	q->map = NULL;
	free(q->ios);
	free(q->pieces);
	q->ios = NULL;
	q->pieces = NULL;
}

static bool is_any_busy(const struct uq_piece *pieces, uint32_t nr)
{
	for (; nr; nr--, pieces++)
		if (__atomic_load_n(&pieces->step, __ATOMIC_RELAXED) != UQ_IDLE)
			return true;
	return false;
}

bool uq_is_waiting(const struct uq_queue *q)
{
	return is_any_busy(q->pieces, q->nr_pieces) ||
	       (q->meta_pieces && is_any_busy(q->meta_pieces, q->opt.depth));
}
