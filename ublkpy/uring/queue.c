// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "engine.h"

#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* A request that crosses borders is served in several pieces at a time. */
#define SPARE_PIECES(depth)	((uint32_t)(depth) + 64)

static const struct timespec pause_for_memory = { .tv_nsec = 1000000 };

/*
 * What is in it goes to the kernel, once that has memory for it. If it has none
 * for a minute, better no process, which can be recovered, than a request that
 * is lost.
 */
struct io_uring_sqe *make_room(struct uq_queue *q)
{
	for (int tries = 0; tries < 60000; tries++) {
		struct io_uring_sqe *sqe;

		if (tries)
			nanosleep(&pause_for_memory, NULL);
		ur_submit_and_wait(&q->ring, 0);
		sqe = ur_get_sqe(&q->ring);
		if (sqe)
			return sqe;
	}
	abort();
}

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
		q->woken = true;
		drain_begin(q);
		break;
	case FROM_METADATA:
		meta_done(q, (uint16_t)nr, cqe->res);
		break;
	case FROM_FILE_OP:
		file_op_done(q, nr, cqe->res);
		break;
	case FROM_NOBODY: /* whoever needed it fails in his turn */
		break;
	}
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

/* Sends what there is, and sees to what comes back. */
static int turn(struct uq_queue *q, unsigned int wait_nr)
{
	unsigned int nr;
	int ret;

	drv_send(q);
	if (q->draining && !q->drain_left)
		drain_end(q);
	ret = ur_submit_and_wait(&q->ring, wait_nr);
	q->expected = 0;
	nr = ur_cq_ready(&q->ring);
	if (ret < 0 && ret != -EINTR && ret != -EAGAIN && ret != -EBUSY)
		return ret;
	/* No memory for a request just now: let some come back. */
	if (ret == -EAGAIN && !nr)
		nanosleep(&pause_for_memory, NULL);
	look_at_map(q);
	for (unsigned int i = 0; i < nr; i++)
		handle_cqe(q, ur_cqe(&q->ring, i));
	look_away(q);
	ur_cq_advance(&q->ring, nr);
	return q->failed;
}

/* What Python has to know before it goes on. */
static int event(struct uq_queue *q)
{
	if (q->asked >= 0) {
		send_all(q);
		up_ask(q);
		return UQ_UPCALLS;
	}
	if (q->report) {
		q->report = false;
		return UQ_IO_ERROR;
	}
	if (q->woken) {
		q->woken = false;
		return UQ_WOKEN;
	}
	return q->nr_ended ? UQ_FILE_OPS : UQ_NOTHING;
}

int uq_run(struct uq_queue *q)
{
	if (q->nr_calls)
		up_take_results(q);
	while (q->live || q->in_hand) {
		int ret = turn(q, to_wait_for(q));

		if (!ret)
			ret = event(q);
		if (ret != UQ_NOTHING)
			return ret;
	}
	return UQ_STOPPED;
}

/*
 * The ring's own descriptor will not do: up to Linux 6.18 it tells nobody of task
 * work that waits to be run (io_req_local_work_add()), which ublk commands are.
 */
int uq_listen(struct uq_queue *q)
{
	int ret;

	if (q->listen_fd >= 0)
		return q->listen_fd;
	q->listen_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (q->listen_fd < 0)
		return -errno;
	ret = ur_register_eventfd(&q->ring, q->listen_fd);
	return ret ? ret : q->listen_fd;
}

static bool is_busy(const struct uq_queue *q)
{
	return q->live || q->in_hand || q->file_ops;
}

int uq_poll(struct uq_queue *q)
{
	int ret = 0;

	if (q->nr_calls)
		up_take_results(q);
	if (is_busy(q))
		ret = turn(q, 0);
	if (!ret)
		ret = event(q);
	if (ret != UQ_NOTHING)
		return ret;
	/* Nobody looks again before something comes back. */
	send_all(q);
	if (ur_has_unsent(&q->ring))
		return UQ_WOKEN;
	return is_busy(q) ? UQ_NOTHING : UQ_STOPPED;
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
	q->calls = calloc(depth + spares, sizeof(*q->calls));
	q->results = calloc(depth + spares, sizeof(*q->results));
	q->max_file_ops = 2 * depth;
	q->ended = calloc(q->max_file_ops, sizeof(*q->ended));
	if (!q->ios || !q->pieces || !q->calls || !q->results || !q->ended)
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
	 * fetched batch of them, for batches of results, for file operations,
	 * and for what is submitted while a round is handled: it never
	 * overflows, which a multishot fetch would not survive.
	 */
	ret = ur_ring_init(&q->ring, entries,
			   3U * q->opt.depth + SPARE_PIECES(q->opt.depth) +
				   q->max_file_ops + 2U * entries + 64,
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
	q->listen_fd = -1;
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
		if (q->listen_fd >= 0)
			close(q->listen_fd);
	}
	q->map = NULL;
	free(q->ios);
	free(q->pieces);
	free(q->calls);
	free(q->results);
	free(q->ended);
	q->ios = NULL;
	q->pieces = NULL;
	q->calls = NULL;
	q->results = NULL;
	q->ended = NULL;
}

int uq_ring_fd(const struct uq_queue *q)
{
	return q->ring.fd;
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
