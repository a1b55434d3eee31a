// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static int sys_setup(unsigned int entries, struct io_uring_params *p)
{
	int ret = (int)syscall(SYS_io_uring_setup, entries, p);

	return ret < 0 ? -errno : ret;
}

static int sys_enter(int fd, unsigned int to_submit, unsigned int min_complete,
		     unsigned int flags)
{
	int ret = (int)syscall(SYS_io_uring_enter, fd, to_submit, min_complete,
			       flags, NULL, 0);

	return ret < 0 ? -errno : ret;
}

static int sys_register(int fd, unsigned int op, const void *arg,
			unsigned int nr)
{
	int ret = (int)syscall(SYS_io_uring_register, fd, op, arg, nr);

	return ret < 0 ? -errno : ret;
}

static int map_rings(struct ur_ring *r, const struct io_uring_params *p)
{
	size_t sq_len = p->sq_off.array + p->sq_entries * sizeof(uint32_t);
	size_t cq_len = p->cq_off.cqes +
			p->cq_entries * sizeof(struct io_uring_cqe);
	unsigned char *m;
	uint32_t *array;

	r->ring_map_len = sq_len > cq_len ? sq_len : cq_len;
	m = mmap(NULL, r->ring_map_len, PROT_READ | PROT_WRITE,
		 MAP_SHARED | MAP_POPULATE, r->fd, IORING_OFF_SQ_RING);
	if (m == MAP_FAILED)
		return -errno;
	r->ring_map = m;
	r->sqe_size = p->flags & IORING_SETUP_SQE128 ? 128 : 64;
	r->sqes_map_len = (size_t)p->sq_entries * r->sqe_size;
	r->sqes = mmap(NULL, r->sqes_map_len, PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_POPULATE, r->fd, IORING_OFF_SQES);
	if (r->sqes == MAP_FAILED) {
		r->sqes = NULL;
		return -errno;
	}
	/* A forked child must not keep the ring, and so the device, alive. */
	if (madvise(r->ring_map, r->ring_map_len, MADV_DONTFORK) ||
	    madvise(r->sqes, r->sqes_map_len, MADV_DONTFORK))
		return -errno;

	r->sq_head = (unsigned int *)(m + p->sq_off.head);
	r->sq_tail = (unsigned int *)(m + p->sq_off.tail);
	r->sq_mask = *(unsigned int *)(m + p->sq_off.ring_mask);
	r->sq_entries = p->sq_entries;
	r->cq_head = (unsigned int *)(m + p->cq_off.head);
	r->cq_tail = (unsigned int *)(m + p->cq_off.tail);
	r->cq_mask = *(unsigned int *)(m + p->cq_off.ring_mask);
	r->cqes = (struct io_uring_cqe *)(m + p->cq_off.cqes);

	/* Slot i always holds SQE i, so the array is written only once. */
	array = (uint32_t *)(m + p->sq_off.array);
	for (uint32_t i = 0; i < p->sq_entries; i++)
		array[i] = i;
	return 0;
}

int ur_ring_init(struct ur_ring *r, unsigned int entries,
		 unsigned int cq_entries, unsigned int flags)
{
	struct io_uring_params p = {
		.flags = flags | IORING_SETUP_CQSIZE,
		.cq_entries = cq_entries,
	};
	int ret;

	memset(r, 0, sizeof(*r));
	r->fd = sys_setup(entries, &p);
	if (r->fd < 0)
		return r->fd;
	if (!(p.features & IORING_FEAT_SINGLE_MMAP)) {
		ret = -EOPNOTSUPP;
		goto fail;
	}
	r->enter_fd = r->fd;
	ret = map_rings(r, &p);
	if (!ret)
		return 0;
fail:
	ur_ring_exit(r);
	return ret;
}

void ur_ring_exit(struct ur_ring *r)
{
	/* The ring lives on in the kernel until its mappings are gone too. */
	if (r->sqes)
		munmap(r->sqes, r->sqes_map_len);
	if (r->ring_map)
		munmap(r->ring_map, r->ring_map_len);
	if (r->fd >= 0)
		close(r->fd);
	memset(r, 0, sizeof(*r));
	r->fd = -1;
}

int ur_register_eventfd(struct ur_ring *r, int fd)
{
	return sys_register(r->fd, IORING_REGISTER_EVENTFD, &fd, 1);
}

int ur_register_ring_fd(struct ur_ring *r)
{
	struct io_uring_rsrc_update up = {
		.offset = (uint32_t)-1,
		.data = (uint64_t)r->fd,
	};
	int ret = sys_register(r->fd, IORING_REGISTER_RING_FDS, &up, 1);

	if (ret < 0)
		return ret;
	r->enter_fd = (int)up.offset;
	r->enter_flags = IORING_ENTER_REGISTERED_RING;
	return 0;
}

int ur_register_files(struct ur_ring *r, const int *fds, unsigned int nr)
{
	return sys_register(r->fd, IORING_REGISTER_FILES, fds, nr);
}

int ur_register_buffer_slots(struct ur_ring *r, unsigned int nr)
{
	struct io_uring_rsrc_register reg = {
		.nr = nr,
		.flags = IORING_RSRC_REGISTER_SPARSE,
	};

	return sys_register(r->fd, IORING_REGISTER_BUFFERS2, &reg, sizeof(reg));
}

int ur_register_buf_ring(struct ur_ring *r, struct io_uring_buf *bufs,
			 unsigned int nr, uint16_t group)
{
	struct io_uring_buf_reg reg = {
		.ring_addr = (uint64_t)(uintptr_t)bufs,
		.ring_entries = nr,
		.bgid = group,
	};

	return sys_register(r->fd, IORING_REGISTER_PBUF_RING, &reg, 1);
}

int ur_submit_and_wait(struct ur_ring *r, unsigned int wait_nr)
{
	unsigned int head = __atomic_load_n(r->sq_head, __ATOMIC_ACQUIRE);

	/* Release: the SQEs are written before the kernel sees the new tail. */
	__atomic_store_n(r->sq_tail, r->sqe_tail, __ATOMIC_RELEASE);
	return sys_enter(r->enter_fd, r->sqe_tail - head, wait_nr,
			 r->enter_flags | IORING_ENTER_GETEVENTS);
}

static int submit_one(struct ur_ring *r)
{
	int ret = ur_submit_and_wait(r, 0);

	if (ret < 0)
		return ret;
	return ret == 1 ? 0 : -EAGAIN;
}

int ur_prep_cmd(struct ur_ring *r, int fd, uint32_t cmd_op, const void *cmd,
		size_t cmd_len, uint64_t user_data)
{
	struct io_uring_sqe *sqe = ur_get_sqe(r);

	if (!sqe)
		return -EBUSY;
	if (cmd_len > r->sqe_size - offsetof(struct io_uring_sqe, cmd))
		return -EINVAL;
	memset(sqe, 0, r->sqe_size);
	sqe->opcode = IORING_OP_URING_CMD;
	sqe->fd = fd;
	sqe->cmd_op = cmd_op;
	sqe->user_data = user_data;
	memcpy((unsigned char *)sqe + offsetof(struct io_uring_sqe, cmd), cmd,
	       cmd_len);
	return 0;
}

int ur_submit_cmd(struct ur_ring *r, int fd, uint32_t cmd_op, const void *cmd,
		  size_t cmd_len, uint64_t user_data)
{
	int ret = ur_prep_cmd(r, fd, cmd_op, cmd, cmd_len, user_data);

	return ret ? ret : submit_one(r);
}

int ur_submit_cancel(struct ur_ring *r, uint64_t victim, uint64_t user_data)
{
	struct io_uring_sqe *sqe = ur_get_sqe(r);

	if (!sqe)
		return -EBUSY;
	memset(sqe, 0, r->sqe_size);
	sqe->opcode = IORING_OP_ASYNC_CANCEL;
	sqe->fd = -1;
	sqe->addr = victim;
	sqe->user_data = user_data;
	return submit_one(r);
}

int ur_submit_async_nop(struct ur_ring *r, uint64_t user_data)
{
	struct io_uring_sqe *sqe = ur_get_sqe(r);

	if (!sqe)
		return -EBUSY;
	memset(sqe, 0, r->sqe_size);
	sqe->opcode = IORING_OP_NOP;
	sqe->flags = IOSQE_ASYNC;
	sqe->fd = -1;
	sqe->user_data = user_data;
	return submit_one(r);
}

int ur_next_cqe(struct ur_ring *r, uint64_t *user_data, int32_t *res)
{
	const struct io_uring_cqe *cqe;

	if (!ur_cq_ready(r))
		return -EAGAIN;
	cqe = ur_cqe(r, 0);
	*user_data = cqe->user_data;
	*res = cqe->res;
	ur_cq_advance(r, 1);
	return 0;
}
