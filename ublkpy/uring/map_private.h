/* SPDX-License-Identifier: MIT */
/*
 * What the files of the map share: the tree being changed, and the dead.
 */
#ifndef UBLKPY_MAP_PRIVATE_H
#define UBLKPY_MAP_PRIVATE_H

#include <stdbool.h>

#include "map.h"

/* NULL if there is no memory. On cache lines of its own. */
void *um_alloc(size_t bytes);

/*
 * map_readers.c, under lock: takes what the latest publication replaced, and
 * frees of all that was replaced what no reader can have in its hands.
 */
void um_bury(struct um_map *map, struct um_dead *dead);
void um_reclaim(struct um_map *map);

/* At least so many entries in each node but the root. */
#define MT_MIN_FILL	(UM_FANOUT / 4)

/*
 * map_tree.c: changes to the B+tree, away from its readers. A change copies the
 * nodes on its way and may then alter the copies as it likes until they are
 * published, so that many pieces in one change cost little more than in a tree
 * that is altered in place. No locks and no atomics: the caller is the only
 * writer.
 *
 * Owner: the caller, on its stack; mt_begin() takes over the map's spare nodes,
 * mt_commit() and mt_abort() give them back.
 */
struct mt_change {
	struct um_map *map;
	uint16_t space;			/* whose tree it is */
	const struct um_routing *routings;
	struct um_node *root;
	struct um_node *spare;
	uint32_t nr_spare;
	uint64_t epoch;			/* birth of the nodes that are ours */
	uint64_t size;
	uint64_t nr_extents;
	uint64_t nr_nodes;
	struct um_flush *flush;
	struct um_dead *dead;		/* published nodes that it lost */
};

void mt_begin(struct mt_change *t, struct um_map *map, uint16_t space);
/* Makes an empty tree to begin with. */
int mt_plant(struct mt_change *t, uint64_t size);
/* One piece, valid, its offset 0 if its routing does not use it. */
int mt_put(struct mt_change *t, const struct um_extent *piece);
/* What is left of the spare nodes goes back to the map; dead stays in t. */
void mt_commit(struct mt_change *t);
void mt_abort(struct mt_change *t);

/* Whether extents of this routing have an offset. */
bool mt_is_placed(const struct um_routing *routing);
/* Whether two extents, of which one begins where the other ends, are one. */
bool mt_continues(const struct um_extent *left, const struct um_extent *right,
		  const struct um_routing *routings);
void mt_get(const struct um_node *n, uint64_t size, uint64_t pos,
	    struct um_extent *extent);
void mt_free(struct um_node *root);
/* Keeps a node that nobody sees for the next change, or frees it. */
void mt_recycle(struct um_map *map, struct um_dead *dead);
/* Frees all but some of the map's spare nodes. */
void mt_trim(struct um_map *map, uint32_t keep);

#endif
