/* SPDX-License-Identifier: MIT */
/*
 * The queue engine: serves one hardware queue of a ublk device.
 *
 * It fetches requests, routes them to the backing (or answers them at once),
 * and commits exact results, all on one io_uring. No Python runs, so the
 * caller's thread releases the GIL for as long as uq_run() lasts.
 *
 *   queue.c     the ring, the memory, and the loop
 *   driver.c    how requests come and results go: one by one, or in batches
 *   request.c   a request on its way: data in, pieces at the backing, data out
 *   engine.h    what these three share
 *
 * A queue belongs to one thread: uq_init(), uq_run() and uq_exit() are called
 * by the thread that will serve it, because the driver accepts a COMMIT only
 * from the task that sent the FETCH.
 */
#ifndef UBLKPY_QUEUE_H
#define UBLKPY_QUEUE_H

#include <stddef.h>
#include <stdint.h>

#include "ring.h"
#include "ublk_cmd.h"

/* Where a device's bytes live. */
enum uq_route {
	UQ_NULL,	/* nowhere: each request succeeds, nothing is moved */
	UQ_LINEAR,	/* in one file or block device, from an offset on */
};

struct uq_map {
	uint32_t route;		/* enum uq_route */
	int fd;			/* borrowed: open for as long as the queue */
	uint64_t offset;	/* bytes from the start of fd */
	uint8_t is_block_device;
};

/* How the data of a request gets from the driver to the backing and back. */
enum uq_data {
	UQ_COPY,	/* the driver copies it to and from the tag's buffer */
	UQ_GET_DATA,	/* the same, but a WRITE's only when we ask for it */
	UQ_USER_COPY,	/* we read and write it at the character device */
	UQ_ZERO_COPY,	/* we have the request's pages registered as a buffer */
	UQ_AUTO_BUF,	/* the driver registers them before we see the request */
};

struct uq_options {
	int cdev_fd;		/* borrowed: open for as long as the queue */
	uint16_t q_id;
	uint16_t depth;
	uint32_t buf_bytes;	/* the largest request */
	uint8_t data;		/* enum uq_data */
	uint8_t batch;		/* fetch and commit in batches (Linux 7.0) */
	uint16_t slots;		/* of the ring's table of buffers: of the tags
				   beyond, UQ_AUTO_BUF copies the data */
};

/* What uq_run() came back for, when it is not a negative errno. */
enum uq_event {
	UQ_STOPPED = 0,		/* the driver took all tags back */
	UQ_IO_ERROR = 1,	/* a request failed; call uq_run() again */
};

/* Where the data of a request in our hands is. */
enum uq_way {
	UQ_IN_BUFFER,		/* the tag's, which the driver knows */
	UQ_COPIED,		/* in that, but we copy between it and the driver */
	UQ_UNREGISTERED,	/* in the client's pages, still out of reach */
	UQ_REGISTERED,		/* there, as a buffer that we registered */
	UQ_REGISTERED_BY_DRIVER,	/* who takes it back himself */
};

/* A request in our hands. */
struct uq_io {
	uint64_t len;		/* bytes that it covers */
	uint64_t next;		/* bytes from its start that are on their way */
	int32_t error;		/* the first -errno of its pieces */
	uint32_t pending;	/* pieces at the backing */
	uint8_t way;		/* enum uq_way */
};

/* What the SQE of a piece is doing. */
enum uq_step {
	UQ_BACKING,		/* the op itself, at the backing */
	UQ_PULL,		/* a WRITE's data, from the driver to the buffer */
	UQ_PUSH,		/* a READ's data, from the buffer to the driver */
	UQ_GET,			/* a WRITE's data, by NEED_GET_DATA */
};

/* Part of a request with one SQE in flight. */
struct uq_piece {
	uint64_t pos;		/* bytes from the request's start */
	uint64_t offset;	/* where pos lies in the file */
	uint64_t len;
	uint64_t done;		/* bytes of a READ or WRITE served so far */
	uint16_t tag;
	uint16_t slot;		/* of the ring's registered files */
	uint16_t mode;		/* fallocate mode of a WRITE_ZEROES in progress */
	uint16_t retries;
	uint8_t step;		/* enum uq_step */
	int32_t next_free;	/* list of unused pieces; -1 at its end */
};

/* Results on their way to the driver, in batches. */
struct uq_batch {
	struct ublk_elem *elems;	/* nr_arrays arrays of depth elements */
	uint32_t filled;		/* of the array that is being filled */
	uint16_t filling;		/* number of that array */
	uint16_t busy;			/* bit n: the driver may still read array n */
	uint32_t sent[4];		/* elements in each array at the driver */
	struct io_uring_buf *ring;	/* buffers for fetched tags */
	size_t ring_len;
	uint16_t *tags;			/* their memory */
	uint16_t ring_tail;
};

/*
 * Owner: the caller allocates it; uq_init() fills it and takes hold of a ring,
 * mappings and arrays; uq_exit() releases them. The fds stay the caller's.
 */
struct uq_queue {
	struct ur_ring ring;
	struct uq_options opt;
	struct uq_map map;
	const struct ublksrv_io_desc *iods;	/* the driver's, read-only */
	size_t iods_len;
	unsigned char *bufs;			/* depth buffers of buf_bytes */
	size_t bufs_len;
	struct uq_io *ios;			/* one for each tag */
	struct uq_piece *pieces;		/* the first of each tag, then spares */
	int32_t free_piece;			/* first unused spare */
	struct uq_batch batch;
	uint32_t expected;	/* CQEs that come at once and need no waiting */
	uint32_t live;		/* tags, or batch fetches, not yet taken back */
	uint32_t in_hand;	/* requests of ours in batch mode */
	int32_t failed;		/* -errno of a refused ublk command */
	uint8_t report;		/* return UQ_IO_ERROR after this round */

	/* Read by the caller after UQ_IO_ERROR. */
	uint64_t errors;	/* requests failed so far */
	uint32_t error_op;	/* UBLK_IO_OP_* of the last one */
	int32_t error_res;	/* its -errno */
	uint64_t error_sector;
};

int uq_init(struct uq_queue *q, const struct uq_options *opt,
	    const struct uq_map *map);
int uq_run(struct uq_queue *q);
void uq_exit(struct uq_queue *q);

#endif
