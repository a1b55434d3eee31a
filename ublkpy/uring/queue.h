/* SPDX-License-Identifier: MIT */
/*
 * The queue engine: serves one hardware queue of a ublk device, or, where
 * several threads serve it, the share of one of them.
 *
 * It fetches requests, routes them to the backing (or answers them at once),
 * and commits exact results, all on one io_uring. No Python runs, so the
 * caller's thread releases the GIL for as long as uq_run() lasts.
 *
 *   queue.c     the ring, the memory, and the loop
 *   driver.c    how requests come and results go: one by one, or in batches
 *   data.c      how their data gets from the driver into our memory and back
 *   pattern.c   data that says where it is
 *   shmem.c     data that is there already, in memory that a client shares
 *   request.c   a request on its way: data in, pieces at the backing, data out
 *   fault.c     what befalls a request before that
 *   place.c     where its bytes are, by the map
 *   zone.c      operations on zones, for Python
 *   upcall.c    what Python is asked about it, and answers
 *   backing.c   a piece at the file behind it
 *   file_op.c   what Python does with files of its own, on the same ring
 *   drain.c     telling who waits for it that a range has nothing in flight
 *   integrity.c the metadata that comes with the data
 *   engine.h    what these share
 *
 * A uq_queue belongs to one thread: uq_init(), uq_run() and uq_exit() are called
 * by the thread that will serve it, because the driver accepts a COMMIT only
 * from the task that sent the FETCH.
 *
 * Threads of one hardware queue share its memory, a uq_memory, and nothing else.
 * One by one, each has its own tags. In batch mode any of them may get any tag,
 * and commits it itself; the first thread has to be ready before the others
 * begin, because it tells the driver the tags.
 */
#ifndef UBLKPY_QUEUE_H
#define UBLKPY_QUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "map.h"
#include "ring.h"
#include "ublk_cmd.h"

/* How the data of a request gets from the driver to the backing and back. */
enum uq_data {
	UQ_COPY,	/* the driver copies it to and from the tag's buffer */
	UQ_GET_DATA,	/* the same, but a WRITE's only when we ask for it */
	UQ_USER_COPY,	/* we read and write it at the character device */
	UQ_ZERO_COPY,	/* we have the request's pages registered as a buffer */
	UQ_AUTO_BUF,	/* the driver registers them before we see the request */
};

/* What the driver hands out with the data (Linux 7.0: UBLK_F_INTEGRITY). */
struct uq_metadata {
	uint8_t bytes;		/* for each interval of data; 0: there is none */
	uint8_t interval_shift;	/* log2 of the interval's bytes */
	uint8_t kind;		/* UM_NULL: kept nowhere; UM_FILE */
	uint16_t slot;		/* UM_FILE: of the map's files */
};

#define UQ_MAX_SHARED	256

/*
 * The memory that clients share with us, by the driver's index. Its owner fills
 * and empties it with the functions below, while queues look into it.
 */
struct uq_shared {
	struct {
		unsigned char *base;	/* NULL: none */
		uint64_t len;
	} bufs[UQ_MAX_SHARED];
	uint32_t registering;	/* the driver may know one that is not here yet */
};

struct uq_options {
	int cdev_fd;		/* borrowed: open for as long as the queue */
	uint16_t q_id;
	uint16_t depth;
	uint16_t threads;	/* that serve the hardware queue, at most depth */
	uint16_t thread;	/* which of them this is */
	uint16_t iod_bytes;	/* of a descriptor (Linux 7.3: UBLK_F_IO_DESC_SIZE) */
	uint32_t buf_bytes;	/* the largest request */
	uint8_t data;		/* enum uq_data */
	uint8_t batch;		/* fetch and commit in batches (Linux 7.0) */
	uint16_t slots;		/* of the ring's table of buffers: of the tags
				   beyond, UQ_AUTO_BUF copies the data */
	struct uq_metadata metadata;	/* only with UQ_USER_COPY */
	const struct uq_shared *shared;	/* borrowed; NULL: no UBLK_F_SHMEM_ZC */
};

/* What uq_run() came back for, when it is not a negative errno. */
enum uq_event {
	UQ_STOPPED = 0,		/* the driver took all tags back */
	UQ_IO_ERROR = 1,	/* a request failed; call uq_run() again */
	UQ_UPCALLS = 2,		/* see calls and results; then likewise */
	UQ_WOKEN = 3,		/* by uq_wake(); likewise */
	UQ_FILE_OPS = 4,	/* from uq_poll(): see ended; likewise */
	UQ_NOTHING = 5,		/* from uq_poll(): all is done for now */
};

/* A result that comes later. */
#define UQ_LATER	1

/* Where the data of a request in our hands is. */
enum uq_way {
	UQ_IN_BUFFER,		/* the request's, which the driver knows */
	UQ_COPIED,		/* in that, but we copy between it and the driver */
	UQ_UNREGISTERED,	/* in the client's pages, still out of reach */
	UQ_REGISTERED,		/* there, as a buffer that we registered */
	UQ_REGISTERED_BY_DRIVER,	/* who takes it back himself */
};

/* A request in our hands. */
struct uq_io {
	unsigned char *buf;	/* its data in our memory: the tag's, or other */
	int32_t error;		/* the first -errno of its pieces */
	uint32_t pending;	/* pieces that are not done */
	uint8_t way;		/* enum uq_way */
	uint8_t injected;	/* error is a fault's */
	uint64_t append_sector;	/* where a ZONE_APPEND went, until it ends */
};

/* What a piece is waiting for. */
enum uq_step {
	UQ_IDLE,		/* nothing: it has no part in a request */
	UQ_BACKING,		/* the op itself, at the backing */
	UQ_GET,			/* a WRITE's data, from the driver */
	UQ_ASKED,		/* Python */
	UQ_ASKED_EARLY,		/* likewise, before a WRITE's data is taken */
	UQ_ASKED_FAILED,	/* likewise, because a file failed */
	UQ_DELAYED,		/* time, before it has a place */
};

/*
 * Part of a request, [pos, end) in bytes from its start; of a FLUSH, of what the
 * map's spaces have to do (UQ_FLUSH_STEPS each). It has one SQE in flight, for len bytes from pos on,
 * which are in one place; or in several files at the same time, of which leg is
 * under way, and those up to legs are still to come.
 */
struct uq_piece {
	uint32_t pos;
	uint32_t end;
	uint32_t len;
	uint32_t done;		/* bytes of len that this step has moved */
	union {
		struct {
			uint64_t offset;	/* where pos lies in the file */
			uint64_t at;	/* and in the space that says so */
		};
		struct __kernel_timespec delay;	/* UQ_DELAYED: the kernel reads it */
	};
	int32_t next;		/* list of unused or asked pieces; -1 ends it */
	uint32_t spared;	/* no fault befalls what is before this */
	uint32_t width;		/* bytes in the file of what moves no data */
	uint16_t tag;
	uint16_t slot;		/* of the map's files */
	uint16_t space;		/* of the map's */
	union {
		uint16_t mode;	/* fallocate mode of a WRITE_ZEROES in progress */
		uint16_t error;	/* UQ_DELAYED: the errno that it then fails with;
				   UQ_ASKED_FAILED: that of the file */
	};
	uint8_t retries;
	uint8_t step;		/* enum uq_step */
	uint8_t kind;		/* enum um_kind: who answers for len bytes */
	uint8_t drains : 1;	/* somebody waits for the end of this step */
	uint8_t asks : 1;	/* what fails is Python's to decide */
	uint8_t leg;
	uint8_t legs;		/* 0: it is in one file */
} __attribute__((aligned(64)));

/* What a FLUSH may have to do in a space: one step for each file. */
#define UQ_FLUSH_STEPS	(1U << 16)

/*
 * A piece for Python: the bytes [pos, pos + len) of a space. Python reads arrays
 * of these as bytes, and depends on the layout.
 */
struct uq_upcall {
	uint64_t pos;
	uint64_t len;		/* 0: FLUSH */
	uint64_t place;		/* of the data of a READ or WRITE, in the bufs
				   of the uq_memory */
	uint32_t what;		/* UBLK_IO_OP_*; below, what makes it unusual;
				   above, the number of the space */
	uint32_t piece;		/* for uq_answer() or uq_retry() */
	uint32_t flags;		/* UBLK_IO_F_* */
	uint16_t error;		/* UQ_HAS_FAILED: the errno */
	uint16_t slot;		/* and the file of the map that failed */
};

#define UQ_IS_FUA	(1U << 8)
#define UQ_IS_EARLY	(1U << 9)	/* a WRITE whose data is not there yet */
#define UQ_IS_ELSEWHERE	(1U << 10)	/* place is an address */
#define UQ_HAS_FAILED	(1U << 11)	/* it wants to be tried again, or to fail */
#define UQ_SPACE_SHIFT	16

/* The end of a uq_file_op(). */
struct uq_ended {
	uint32_t id;
	int32_t res;
};

/* Results on their way to the driver, in batches. */
struct uq_batch {
	unsigned char *elems;		/* arrays of depth elements */
	unsigned char *next;		/* element of the array being filled */
	uint32_t filled;		/* elements in it */
	uint32_t elem_bytes;		/* struct ublk_elem, or half of it */
	uint16_t filling;		/* number of that array */
	uint16_t busy;			/* bit n: the driver may still read array n */
	uint32_t sent[4];		/* elements in each array at the driver */
	struct io_uring_buf *ring;	/* buffers for fetched tags */
	size_t ring_len;
	uint16_t *tags;			/* their memory */
	uint16_t buf_tags;		/* how many each of them takes */
	uint16_t ring_tail;
	uint32_t taken;			/* bit n: buffer n is with us */
};

/*
 * What belongs to a hardware queue, whichever thread serves it.
 *
 * Owner: the caller allocates it; uq_map_memory() maps both, before the queue's
 * first thread begins; uq_unmap_memory() unmaps them after its last has ended,
 * because the driver may write to the buffer of any tag until then.
 */
struct uq_memory {
	const unsigned char *iods;		/* the driver's, read-only */
	size_t iods_len;
	unsigned char *bufs;			/* depth buffers of buf_bytes */
	size_t bufs_len;
};

/*
 * Owner: the caller allocates it; uq_init() fills it and takes hold of a ring
 * and arrays; uq_exit() releases them. The fds and the memory stay the caller's.
 */
struct uq_queue {
	struct ur_ring ring;
	struct uq_options opt;
	struct um_map *map;			/* borrowed, as the fds in it */
	struct um_reader reader;
	const struct um_view *view;		/* while the reader is inside */
	uint32_t nr_fixed;			/* files registered with the ring */
	const unsigned char *iods;		/* borrowed from the uq_memory */
	unsigned char *bufs;			/* likewise */
	struct uq_io *ios;			/* one for each tag */
	struct uq_piece *pieces;		/* the first of each tag, then spares */
	uint32_t nr_pieces;
	struct uq_piece *meta_pieces;		/* one for each tag */
	unsigned char *meta_bufs;
	size_t meta_bufs_len;
	int32_t free_piece;			/* first unused spare */
	int32_t asked;				/* first piece for Python */
	int32_t last_asked;
	struct uq_batch batch;
	int wake_fd;		/* eventfd; owned */
	int listen_fd;		/* likewise, of uq_listen(); or -1 */
	uint8_t draining;	/* for number drain_nr, drain_left pieces */
	uint64_t drain_nr;
	uint32_t drain_left;
	uint32_t expected;	/* CQEs that come at once and need no waiting */
	uint32_t live;		/* tags, or batch fetches, not yet taken back */
	uint32_t in_hand;	/* requests of ours in batch mode */
	int32_t failed;		/* -errno of a refused ublk command */
	uint8_t way;		/* enum uq_way of most requests */
	uint8_t report;		/* return UQ_IO_ERROR after this round */
	uint8_t woken;		/* return UQ_WOKEN after this round */
	uint64_t drawn;		/* random numbers so far */

	/* Read by the caller after UQ_IO_ERROR. */
	uint64_t errors;	/* requests failed so far */
	uint64_t injected;	/* of them, by faults of the map */
	uint32_t error_op;	/* UBLK_IO_OP_* of the last one */
	int32_t error_res;	/* its -errno */
	uint64_t error_sector;

	/*
	 * After UQ_UPCALLS, what Python is asked, and places for its results: 0,
	 * all of it is done; -errno, the request fails; UQ_LATER. What it leaves
	 * as it is fails with EIO. They count at the next uq_run() or uq_poll().
	 */
	struct uq_upcall *calls;
	int32_t *results;
	uint32_t nr_calls;
	uint64_t upcalls;	/* how many so far */

	/*
	 * After UQ_FILE_OPS, as many as have ended; who has read them sets nr_ended
	 * to 0.
	 */
	struct uq_ended *ended;
	uint32_t nr_ended;
	uint32_t file_ops;	/* on their way */
	uint32_t max_file_ops;	/* so many of both at most */
};

/* Of the options, those that are the same for all threads. */
int uq_map_memory(struct uq_memory *m, const struct uq_options *opt);
void uq_unmap_memory(struct uq_memory *m);

/*
 * Sends FETCH for all tags of a queue, on a ring of the caller with an entry for
 * each, with addr for their buffers. For a thread that dies with it: nobody
 * takes what comes.
 */
int uq_fetch_unserved(struct ur_ring *r, int cdev_fd, uint16_t q_id,
		      uint32_t depth, uint64_t addr);

int uq_init(struct uq_queue *q, const struct uq_options *opt,
	    const struct uq_memory *memory, struct um_map *map);
int uq_run(struct uq_queue *q);
/*
 * Without waiting: for who waits for other things as well. uq_listen() returns
 * an eventfd that tells when to; it is the caller's to read, before uq_poll().
 */
int uq_poll(struct uq_queue *q);
int uq_listen(struct uq_queue *q);
void uq_exit(struct uq_queue *q);

/* The ring's descriptor, which a forked child closes. */
int uq_ring_fd(const struct uq_queue *q);

/*
 * Whether there are requests that wait for something, for any thread, between
 * uq_init() and uq_exit(). A look, no more: one that comes or goes meanwhile is
 * seen or not, so the loads are relaxed.
 */
bool uq_is_waiting(const struct uq_queue *q);

/* The results of all calls: they are done; they come later. */
void uq_done(struct uq_queue *q);
void uq_defer(struct uq_queue *q);

/*
 * Results that come later: once for each upcall, as above, by the queue's
 * thread; or the map has changed, and is asked again. An early one is either
 * answered with -errno, or says where its data is to go, len bytes that are good
 * until the request is answered; it then comes again.
 */
void uq_answer(struct uq_queue *q, uint32_t piece, int32_t res);
void uq_retry(struct uq_queue *q, uint32_t piece);
void uq_receive(struct uq_queue *q, uint32_t piece, void *buf);
/* Before the answer to a ZONE_APPEND: where its data went, in bytes. */
void uq_appended(struct uq_queue *q, uint32_t piece, uint64_t pos);

/*
 * An operation on a file for the queue's thread, in the terms of its SQE (flags:
 * fsync_flags and its like); id comes back with its end. Memory and file are the
 * caller's, who keeps them until then. -EBUSY: there are max_file_ops.
 */
int uq_file_op(struct uq_queue *q, uint32_t id, uint8_t opcode, int fd,
	       uint64_t addr, uint32_t len, uint64_t off, uint32_t flags);

/* Has uq_run() return UQ_WOKEN. Any thread, until uq_exit(). */
int uq_wake(struct uq_queue *q);

/*
 * For one thread at a time, which need not be a queue's. A buffer is shared
 * when the driver has registered it, and uq_registering() spans both. It is
 * unshared after the driver, which waits for its requests, has let go of it.
 */
void uq_registering(struct uq_shared *s, int is_under_way);
int uq_share(struct uq_shared *s, uint32_t index, void *base, uint64_t len);
void uq_unshare(struct uq_shared *s, uint32_t index);

#endif
