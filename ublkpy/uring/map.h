/* SPDX-License-Identifier: MIT */
/*
 * The extent map: where each byte of a device lives, and what is done about it.
 *
 * A map has one or several spaces. A space is a partition of [0, size) into
 * extents. An extent has a routing that says for each op what to do; positions
 * are in bytes, starts and ends are multiples of 512. The first space is the
 * device; the others are what extents of spaces with lower numbers go on in. No
 * I/O happens here.
 *
 * Writers (any thread, one at a time by the map's mutex) never change what has
 * been published: they make a new tree that shares most of its nodes with the
 * old one, and publish it, with all that belongs to it, as one um_view.
 *
 * Readers take no lock. A thread that wants to look something up embeds a
 * um_reader, and between um_reader_enter() and um_reader_leave() each view it
 * gets from um_current() stays valid. What a publication replaced is freed once
 * each reader has been outside, or has entered again, since then.
 *
 * Every function that can fail returns 0 or a count, or -errno.
 */
#ifndef UBLKPY_MAP_H
#define UBLKPY_MAP_H

#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

enum um_op { UM_READ, UM_WRITE, UM_DISCARD, UM_WRITE_ZEROES, UM_NR_OPS };

enum um_kind {
	UM_NULL,	/* succeeds, moves nothing */
	UM_ZERO,	/* gives zeroes; what is written is forgotten */
	UM_ERROR,	/* fails */
	UM_UPCALL,	/* Python decides */
	UM_UPCALL_EARLY,	/* likewise, and where the data of a WRITE goes */
	/* What has a place, so that the offset of its extent counts. */
	UM_PATTERN,	/* each 8 bytes hold their offset, or a WRITE fails */
	UM_MEMORY,	/* in our own memory */
	UM_FILE,	/* in one file */
	/* What has legs. In a hit, it is UM_FILE, or what their space says. */
	UM_STRIPE,	/* in turns in several files */
	UM_MIRROR,	/* in each of several files, at the same place */
	UM_SPACES,	/* in turns in several other spaces, or in one */
};

#define UM_MAX_FILES	65535
#define UM_MAX_SPACES	4096
#define UM_MAX_ERRNO	4095
#define UM_MAX_FAULTS	32768

/*
 * Where an errno may stand, this and more is a fault, by its number: so it is
 * looked at where requests fail, and those without any do not pay for it.
 */
#define UM_FIRST_FAULT	(UM_MAX_ERRNO + 1)

/*
 * What to do with one op. With p = extent.offset + (pos - extent.start), a byte
 * of a UM_FILE is at p + shift in the file, and that of a UM_MEMORY at this
 * address. That of a UM_STRIPE is in chunk
 * c = p >> chunk_shift, which is number c / nr_legs in file slot + c % nr_legs,
 * and shift is added there. That of a UM_MIRROR is at p + shift in all of its
 * files; a READ takes chunk c from file slot + c % nr_legs. What fails there is
 * Python's to decide. UM_SPACES is as UM_STRIPE, with spaces, whatever the op.
 */
struct um_action {
	uint8_t kind;		/* enum um_kind */
	uint8_t chunk_shift;	/* with legs: log2 of the chunk's bytes, >= 9 */
	uint16_t slot;		/* UM_FILE, or with legs: the first file, or space */
	uint8_t nr_legs;	/* so many files, one slot each, or spaces */
	uint16_t error;		/* UM_ERROR: an errno; others: a fault, or 0 */
	int64_t shift;		/* bytes */
};

struct um_routing {
	struct um_action actions[UM_NR_OPS];
};

/* The map borrows fd: open for as long as the map. */
struct um_file {
	int fd;
	uint8_t is_block_device;
	uint8_t in_memory;	/* reading and writing it never waits for I/O */
};

enum um_distribution {
	UM_CONSTANT,
	UM_UNIFORM,	/* from 0 to twice the mean */
	UM_EXPONENTIAL,
};

#define UM_MAX_DELAY	3600000000000ULL	/* an hour */

/*
 * What befalls requests before anything is done about them: they are late, and
 * some of them fail.
 */
struct um_fault {
	uint64_t delay;		/* ns, the mean; UM_MAX_DELAY at most, as each is */
	double error_rate;	/* 0 to 1 */
	uint64_t seed;
	char *path;		/* only while it exists; NULL: always */
	uint16_t error;		/* an errno */
	uint8_t distribution;	/* enum um_distribution */
};

struct um_extent {
	uint64_t start;
	uint64_t end;
	uint64_t offset;	/* bytes; 0 if the routing has no use for it */
	uint32_t routing;	/* as um_add_routing() returned it */
};

/* Memory that readers may still see after it was replaced. */
struct um_dead {
	struct um_dead *next;
	void *mem;		/* what to free; NULL: a um_node */
	uint64_t epoch;		/* the publication that replaced it */
};

#define UM_KEYS		64
#define UM_FANOUT	58	/* entries of a node at rest */
#define UM_ROOM		(UM_FANOUT + 2)

/*
 * A node of the B+tree. Immutable once published. Entry i covers [keys[i],
 * keys[i + 1]), the last one up to where the parent's entry ends. Unused keys
 * are UINT64_MAX, and there is always one, so that a search needs no count.
 *
 * Owner: the tree being made, then each published tree that it is part of, then
 * the map's list of the dead; dead.epoch is the epoch of its birth until then.
 */
struct um_node {
	uint64_t keys[UM_KEYS];
	struct um_dead dead;
	uint16_t nr;
	uint8_t level;				/* 0: a leaf */
	union {
		struct um_node *child[UM_ROOM];
		uint64_t offset[UM_ROOM];	/* leaf: of the extent */
	};
	uint32_t routing[UM_ROOM];		/* leaf: of the extent */
} __attribute__((aligned(64)));

/* What a FLUSH has to do; part of what is published. Immutable. */
struct um_flush {
	struct um_dead dead;
	uint8_t kind;		/* UM_NULL, UM_UPCALL; UM_FILE: fsync */
	uint8_t asks;		/* UM_FILE: what fails is Python's to decide */
	uint16_t error;		/* a fault, or 0 */
	uint32_t nr;
	uint16_t slots[];	/* each more than the one before it */
};

/* One state of a space; part of a um_view. */
struct um_space {
	uint64_t size;			/* bytes */
	const struct um_routing *only;	/* of the one extent, else NULL */
	uint64_t only_offset;
	struct um_node *root;
	struct um_flush *flush;
	uint64_t nr_extents;
	uint8_t level;			/* of the root */
};

/*
 * One state of the map. Immutable; owned by the map, as all that it points to.
 * The tables only grow: ids and slots of an older view are good in a newer
 * one, and what lies behind nr_files is not to be looked at.
 */
struct um_view {
	const struct um_routing *routings;
	const struct um_file *files;
	const struct um_fault *faults;
	uint32_t nr_files;
	uint16_t nr_spaces;
	struct um_dead dead;
	struct um_space spaces[];
};

struct um_map;

/*
 * Owner: the caller embeds it; the map links it from um_reader_add() to
 * um_reader_remove(). Added, entered and left by one thread.
 */
struct um_reader {
	struct um_map *map;
	struct um_reader *next;
	uint64_t seen;		/* the epoch it entered in; 0: outside */
	uint64_t drained;	/* number of the last drain it has seen to */
	pthread_t thread;
	int wake_fd;		/* borrowed eventfd; -1: nothing to drain here */
};

/* Somebody waits for what is on its way in [start, end). */
struct um_drain {
	uint64_t nr;		/* counts them, from 1 on */
	uint64_t start;		/* bytes */
	uint64_t end;
};

/* A table that readers index while it grows. Owner: the map, then the dead. */
struct um_table;

/*
 * Owner: the caller allocates it; um_init() fills it and um_exit() frees what
 * it holds. Readers touch view and epoch only, all else is the writers', under
 * lock.
 */
struct um_map {
	struct um_view *view;		/* the current one */
	uint64_t epoch;			/* counts publications, from 1 on */
	pthread_mutex_t lock;
	struct um_reader *readers;
	struct um_drain drain;		/* the last one */
	uint8_t draining;		/* it is not over */
	struct um_table *routings;
	struct um_table *files;
	struct um_table *faults;
	struct um_dead *dead;		/* latest first */
	struct um_node *spare;		/* unpublished, for the next change */
	uint32_t nr_spare;
	uint64_t nr_nodes;		/* in the current trees */
	uint64_t nr_dead;		/* on the list above, of any kind */
};

/*
 * The answer to a lookup: it holds for [pos, end). If it is in several files at
 * the same time, um_leg() has the place in each.
 */
struct um_hit {
	uint64_t end;		/* bytes, position in the space it was asked of */
	uint64_t offset;	/* UM_FILE: bytes, position in it; UM_MEMORY: address */
	uint64_t at;		/* bytes, position in the space that says so */
	const struct um_action *action;	/* with nr_legs: of um_leg() */
	uint8_t kind;		/* enum um_kind, never one with legs */
	uint8_t asks;		/* UM_FILE: what fails is Python's to decide */
	uint8_t nr_legs;	/* UM_FILE: in so many, from slot on; 0: in one */
	uint16_t slot;		/* UM_FILE: into um_view.files */
	uint16_t space;		/* that says so */
	int32_t error;		/* UM_ERROR: -errno; others: a fault, negated, or 0 */
};

struct um_stats {
	uint64_t nr_extents;	/* of one space */
	uint64_t nr_nodes;	/* in the current trees */
	uint64_t nr_dead;	/* replaced, but a reader may have it */
	uint32_t levels;	/* of one space; 1: the root is a leaf */
	uint32_t nr_routings;
	uint32_t nr_files;
	uint32_t nr_faults;
	uint32_t nr_spaces;
};

/*
 * With one space, the number 0, at first one extent of routing 0. um_exit():
 * -EBUSY while it has readers.
 */
int um_init(struct um_map *map, uint64_t size);
int um_exit(struct um_map *map);

/*
 * One more, likewise: its number, or -EINVAL for what is no size, -ENOSPC,
 * -ENOMEM.
 */
int um_add_space(struct um_map *map, uint64_t size);

/*
 * These return the id of what they added, or -EINVAL, -ENOSPC, -ENOMEM. A
 * routing may name only files, faults and spaces that have been added. Routing 0
 * is UM_NULL for all ops. Ids are counted from 0 on.
 */
int um_add_file(struct um_map *map, const struct um_file *file);
/* The map makes a copy of path, which is its own. */
int um_add_fault(struct um_map *map, const struct um_fault *fault,
		 const char *path);
int um_add_routing(struct um_map *map, const struct um_routing *routing);

/*
 * Puts the pieces, which may be in any order, in the place of what is there in
 * a space that there is. All at once for readers, and all or nothing: -EINVAL
 * for pieces that overlap, are empty, misaligned, outside, of an unknown
 * routing, where no file can have bytes, or in a space with no lower number;
 * -ENOMEM. The flush, if not NULL, is copied and changes in the same step.
 */
int um_replace(struct um_map *map, uint16_t space,
	       const struct um_extent *pieces, uint64_t nr,
	       const struct um_flush *flush);

/*
 * Moves the end: the last extent stretches up to it, or what is behind it goes.
 * -EINVAL for what is no size, or where the last extent's file would end; -ENOMEM.
 */
int um_resize(struct um_map *map, uint16_t space, uint64_t size);

/* Up to nr extents from the one that holds pos on; returns how many. */
int um_walk(struct um_map *map, uint16_t space, uint64_t pos,
	    struct um_extent *extents, uint32_t nr);
void um_get_stats(struct um_map *map, uint16_t space, struct um_stats *stats);
/* For tests: -EUCLEAN when a tree breaks one of its own rules. */
int um_check(struct um_map *map);

void um_reader_add(struct um_map *map, struct um_reader *reader, int wake_fd);
/* The reader must be outside. */
void um_reader_remove(struct um_reader *reader);

/*
 * Waits until each reader that is inside has left or entered again: from then
 * on nobody uses what was replaced before the call. -ETIMEDOUT after
 * timeout_ms. Never by a reader's own thread while it is inside: it would wait
 * for itself.
 */
int um_synchronize(struct um_map *map, uint32_t timeout_ms);

/*
 * Waits until all that the readers looked up before, in [start, end) of space 0,
 * has been through: until then, I/O may go to where the map said. -ETIMEDOUT after
 * timeout_ms; -EDEADLK in the thread of a reader, which would wait for itself.
 * One at a time; others wait for their turn.
 */
int um_drain(struct um_map *map, uint64_t start, uint64_t end,
	     uint32_t timeout_ms);
/* For a reader, once wake_fd says so: the last drain; and that it is done. */
struct um_drain um_last_drain(const struct um_reader *reader);
void um_drained(struct um_reader *reader, uint64_t nr);

/*
 * For tests and measurements: in each round, looks up all nr positions for READ
 * in one view. Returns in how many rounds the answers were not all of one kind
 * and slot.
 */
uint64_t um_probe(struct um_map *map, const uint64_t *pos, uint32_t nr,
		  uint64_t rounds);

/* The rest is inline because it runs for each request. */

/* Also when already inside: views got before are then no longer valid. */
static inline void um_reader_enter(struct um_reader *r)
{
	/*
	 * Acquire: who reads the epoch of a publication sees its view, too, and
	 * so a reader with that epoch holds nothing that it replaced.
	 */
	uint64_t epoch = __atomic_load_n(&r->map->epoch, __ATOMIC_ACQUIRE);

	/*
	 * Sequentially consistent, as the load in um_current(), and as the
	 * writer's store of the view and its load of this: either the writer
	 * sees that we are inside, or we see its view. It is a release, too:
	 * what was read before under an older epoch has been read.
	 */
	__atomic_store_n(&r->seen, epoch, __ATOMIC_SEQ_CST);
}

static inline void um_reader_leave(struct um_reader *r)
{
	/* Release: all reads of views come before it. */
	__atomic_store_n(&r->seen, 0, __ATOMIC_RELEASE);
}

/* Only inside. */
static inline const struct um_view *um_current(const struct um_map *map)
{
	/* See um_reader_enter(); also an acquire of what the view points to. */
	return __atomic_load_n(&map->view, __ATOMIC_SEQ_CST);
}

/* The entry of n that covers pos: the last key <= pos, without a branch. */
static inline unsigned int um_find(const struct um_node *n, uint64_t pos)
{
	const uint64_t *key = n->keys;

#pragma GCC unroll 8
	for (unsigned int step = UM_KEYS / 2; step; step /= 2)
		key += step * (key[step] <= pos);
	return (unsigned int)(key - n->keys);
}

/* So that a leaf's keys come from memory all together, and not in turns. */
static inline void um_prefetch(const struct um_node *leaf)
{
#pragma GCC unroll 8
	for (unsigned int i = 0; i < UM_KEYS; i += 8)
		__builtin_prefetch(&leaf->keys[i]);
}

/* The same of the other space that the byte p of an extent is in. */
void um_resolve_space(const struct um_view *v, const struct um_action *action,
		      uint64_t pos, uint64_t p, enum um_op op,
		      struct um_hit *hit);

/* The same with legs: of the one, or all, that the byte p of an extent is in. */
static inline void um_resolve_legs(const struct um_action *action, uint64_t pos,
				   uint64_t p, enum um_op op,
				   struct um_hit *hit)
{
	uint64_t chunk = p >> action->chunk_shift;
	uint64_t left = (1ULL << action->chunk_shift) -
			(p & ((1ULL << action->chunk_shift) - 1));

	hit->kind = UM_FILE;
	hit->asks = action->kind == UM_MIRROR;
	/* What moves no data goes to each leg of a stripe as a whole. */
	if (op != UM_READ && (op != UM_WRITE || action->kind == UM_MIRROR)) {
		hit->action = action;
		hit->nr_legs = action->nr_legs;
		return;
	}
	hit->slot = (uint16_t)(action->slot + chunk % action->nr_legs);
	/* Where this chunk ends in the file, less what is left of it. */
	if (action->kind == UM_STRIPE)
		hit->offset = ((chunk / action->nr_legs + 1)
			       << action->chunk_shift) -
			      left + (uint64_t)action->shift;
	if (hit->end - pos > left)
		hit->end = pos + left;
}

/* The answer for the byte p of an extent of a space, which ends at hit->end. */
static inline void um_resolve(const struct um_view *v, uint16_t space,
			      const struct um_action *action, uint64_t pos,
			      uint64_t p, enum um_op op, struct um_hit *hit)
{
	hit->space = space;
	hit->at = pos;
	hit->kind = action->kind;
	hit->asks = 0;
	hit->nr_legs = 0;
	hit->slot = action->slot;
	hit->error = -(int32_t)action->error;
	hit->offset = p + (uint64_t)action->shift;
	if (action->kind < UM_STRIPE)
		return;
	if (action->kind == UM_SPACES)
		um_resolve_space(v, action, pos, p, op, hit);
	else
		um_resolve_legs(action, pos, p, op, hit);
}

/* Of len bytes from a hit with legs on, what is in one of them. */
struct um_part {
	uint64_t offset;	/* bytes, position in the file */
	uint64_t len;		/* may be 0 */
};

struct um_part um_leg(const struct um_hit *hit, uint64_t len, uint8_t leg);

/* um_lookup() in any space, of several extents or one, or behind its end. */
void um_lookup_tree(const struct um_view *v, uint16_t space, uint64_t pos,
		    enum um_op op, struct um_hit *hit);

/* In space 0. Behind the end, everything fails with EIO. */
static inline void um_lookup(const struct um_view *v, uint64_t pos,
			     enum um_op op, struct um_hit *hit)
{
	const struct um_space *s = v->spaces;

	if (!s->only || pos >= s->size) {
		um_lookup_tree(v, 0, pos, op, hit);
		return;
	}
	hit->end = s->size;
	um_resolve(v, 0, &s->only->actions[op], pos, s->only_offset + pos, op,
		   hit);
}

#endif
