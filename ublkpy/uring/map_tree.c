// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "map_private.h"

#include <stdlib.h>
#include <string.h>

/* More than 2^62 / 512 extents would need more. */
#define MAX_LEVELS	16
/* What one splice() may take: the way down, a sibling and a split on each. */
#define MAX_NEW_NODES	(3 * MAX_LEVELS + 1)

_Static_assert(UM_ROOM < UM_KEYS, "each node has an unused key");
_Static_assert(sizeof(struct um_routing) == 64, "one cache line");

/* The way to a leaf: the node of each level, and which entry led down. */
struct path {
	struct um_node *node[MAX_LEVELS];
	unsigned int idx[MAX_LEVELS];
};

void *um_alloc(size_t bytes)
{
	return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

static struct um_node *node_of(struct um_dead *dead)
{
	return (struct um_node *)((char *)dead -
				  offsetof(struct um_node, dead));
}

static void put_spare(struct mt_change *t, struct um_node *n)
{
	n->dead.next = t->spare ? &t->spare->dead : NULL;
	t->spare = n;
	t->nr_spare++;
}

static struct um_node *pop_spare(struct um_node **list, uint32_t *nr)
{
	struct um_node *n = *list;

	*list = n->dead.next ? node_of(n->dead.next) : NULL;
	(*nr)--;
	return n;
}

/* So that nothing fails in the middle of a splice(). */
static int reserve(struct mt_change *t)
{
	while (t->nr_spare < MAX_NEW_NODES) {
		struct um_node *n = um_alloc(sizeof(*n));

		if (!n)
			return -ENOMEM;
		n->dead.mem = NULL;
		put_spare(t, n);
	}
	return 0;
}

static struct um_node *new_node(struct mt_change *t, uint8_t level)
{
	struct um_node *n = pop_spare(&t->spare, &t->nr_spare);

	memset(n->keys, 0xff, sizeof(n->keys));
	n->dead.epoch = t->epoch;
	n->nr = 0;
	n->level = level;
	t->nr_nodes++;
	return n;
}

/* The tree no longer has n: readers may, unless it is ours. */
static void drop(struct mt_change *t, struct um_node *n)
{
	t->nr_nodes--;
	if (n->dead.epoch == t->epoch) {
		put_spare(t, n);
		return;
	}
	n->dead.next = t->dead;
	t->dead = &n->dead;
}

static void copy_entries(struct um_node *to, unsigned int at,
			 const struct um_node *from, unsigned int first,
			 unsigned int nr)
{
	memmove(&to->keys[at], &from->keys[first], nr * sizeof(to->keys[0]));
	memmove(&to->offset[at], &from->offset[first],
		nr * sizeof(to->offset[0]));
	if (!to->level)
		memmove(&to->routing[at], &from->routing[first],
			nr * sizeof(to->routing[0]));
}

static void set_nr(struct um_node *n, unsigned int nr)
{
	for (unsigned int i = nr; i < n->nr; i++)
		n->keys[i] = UINT64_MAX;
	n->nr = (uint16_t)nr;
}

/* Entries [first, last) become a gap of nr entries, for the caller to fill. */
static void resize_gap(struct um_node *n, unsigned int first, unsigned int last,
		       unsigned int nr)
{
	copy_entries(n, first + nr, n, last, n->nr - last);
	set_nr(n, n->nr - (last - first) + nr);
}

/* n, or a copy that may be altered. */
static struct um_node *own(struct mt_change *t, struct um_node *n)
{
	struct um_node *copy;

	if (n->dead.epoch == t->epoch)
		return n;
	copy = new_node(t, n->level);
	copy_entries(copy, 0, n, 0, n->nr);
	copy->nr = n->nr;
	drop(t, n);
	return copy;
}

static struct um_node *own_child(struct mt_change *t, struct um_node *n,
				 unsigned int i)
{
	return n->child[i] = own(t, n->child[i]);
}

static void insert_child(struct um_node *parent, unsigned int i,
			 struct um_node *child)
{
	resize_gap(parent, i, i, 1);
	parent->keys[i] = child->keys[0];
	parent->child[i] = child;
}

/*
 * Moves the end of n to a new node. What grew at its end, as it does when a map
 * is filled in order, will grow there again: then most stays behind.
 */
static struct um_node *split(struct mt_change *t, struct um_node *n,
			     bool at_end)
{
	unsigned int keep = at_end ? n->nr - MT_MIN_FILL : n->nr / 2;
	struct um_node *right = new_node(t, n->level);

	copy_entries(right, 0, n, keep, n->nr - keep);
	right->nr = (uint16_t)(n->nr - keep);
	set_nr(n, keep);
	return right;
}

/* Child i of parent has too few entries: it gets some, or goes. */
static void join(struct mt_change *t, struct um_node *parent, unsigned int i)
{
	struct um_node *left, *right;
	unsigned int total, nr;

	if (i)
		i--;
	left = own_child(t, parent, i);
	right = parent->child[i + 1];
	total = left->nr + right->nr;
	if (total <= UM_FANOUT) {
		copy_entries(left, left->nr, right, 0, right->nr);
		left->nr = (uint16_t)total;
		resize_gap(parent, i + 1, i + 2, 0);
		drop(t, right);
	} else {
		right = own_child(t, parent, i + 1);
		if (left->nr < right->nr) {
			nr = total / 2 - left->nr;
			copy_entries(left, left->nr, right, 0, nr);
			left->nr = (uint16_t)(total / 2);
			resize_gap(right, 0, nr, 0);
		} else {
			nr = total / 2 - right->nr;
			copy_entries(right, nr, right, 0, right->nr);
			right->nr = (uint16_t)(total / 2);
			copy_entries(right, 0, left, left->nr - nr, nr);
			set_nr(left, left->nr - nr);
		}
		parent->keys[i + 1] = right->keys[0];
	}
	parent->keys[i] = left->keys[0];
}

/* Brings the nodes on the way to a leaf that was altered back into shape. */
static void repair(struct mt_change *t, struct path *path, bool at_end)
{
	struct um_node *root, *n;

	for (unsigned int level = 0; level < t->root->level; level++) {
		struct um_node *parent = path->node[level + 1];
		unsigned int i = path->idx[level + 1];

		n = path->node[level];
		if (n->nr)
			parent->keys[i] = n->keys[0];
		if (n->nr > UM_FANOUT)
			insert_child(parent, i + 1, split(t, n, at_end));
		else if (n->nr < MT_MIN_FILL)
			join(t, parent, i);
		at_end = at_end && i + 2 >= parent->nr;
	}
	if (t->root->nr > UM_FANOUT) {
		root = new_node(t, t->root->level + 1);
		insert_child(root, 0, t->root);
		insert_child(root, 1, split(t, t->root, at_end));
		t->root = root;
	}
	while (t->root->level && t->root->nr == 1) {
		root = t->root->child[0];
		drop(t, t->root);
		t->root = root;
	}
}

/* The first entry of a leaf that begins at pos or later. */
static unsigned int first_from(const struct um_node *leaf, uint64_t pos)
{
	unsigned int i = um_find(leaf, pos);

	return leaf->keys[i] < pos ? i + 1 : i;
}

/*
 * Takes the extents out of the leaf around lo that begin in [lo, hi), and puts
 * nr others there instead. Up to two, as many as a leaf at rest has room for.
 */
static int splice(struct mt_change *t, uint64_t lo, uint64_t hi,
		  const struct um_extent *add, unsigned int nr)
{
	unsigned int first, last, level;
	struct um_node *n, *parent;
	struct path path;
	int ret;

	ret = reserve(t);
	if (ret)
		return ret;
	n = t->root = own(t, t->root);
	for (level = n->level; level; level--) {
		parent = n;
		path.node[level] = parent;
		path.idx[level] = um_find(parent, lo);
		n = own_child(t, parent, path.idx[level]);
	}
	path.node[0] = n;
	first = first_from(n, lo);
	last = first_from(n, hi);
	resize_gap(n, first, last, nr);
	for (unsigned int i = 0; i < nr; i++) {
		n->keys[first + i] = add[i].start;
		n->offset[first + i] = add[i].offset;
		n->routing[first + i] = add[i].routing;
	}
	t->nr_extents += nr;
	t->nr_extents -= last - first;
	repair(t, &path, first + nr == n->nr);
	return 0;
}

/* Where the leaf around pos ends. */
static uint64_t leaf_end(const struct mt_change *t, uint64_t pos)
{
	const struct um_node *n = t->root;
	uint64_t end = t->size;

	while (n->level) {
		unsigned int i = um_find(n, pos);

		if (n->keys[i + 1] < end)
			end = n->keys[i + 1];
		n = n->child[i];
	}
	return end;
}

void mt_get(const struct um_node *n, uint64_t size, uint64_t pos,
	    struct um_extent *extent)
{
	unsigned int i;

	extent->end = size;
	for (;; n = n->child[i]) {
		i = um_find(n, pos);
		if (n->keys[i + 1] < extent->end)
			extent->end = n->keys[i + 1];
		if (!n->level)
			break;
	}
	extent->start = n->keys[i];
	extent->offset = n->offset[i];
	extent->routing = n->routing[i];
}

bool mt_is_placed(const struct um_routing *routing)
{
	for (unsigned int op = 0; op < UM_NR_OPS; op++)
		if (routing->actions[op].kind >= UM_PATTERN)
			return true;
	return false;
}

bool mt_continues(const struct um_extent *left, const struct um_extent *right,
		  const struct um_routing *routings)
{
	if (left->routing != right->routing)
		return false;
	return !mt_is_placed(&routings[left->routing]) ||
	       right->offset - left->offset == right->start - left->start;
}

int mt_put(struct mt_change *t, const struct um_extent *piece)
{
	bool joins_left = false;
	uint64_t hi = piece->end, start, end;
	struct um_extent add[2], e;
	unsigned int nr = 0;
	int ret;

	if (piece->start) {
		mt_get(t->root, t->size, piece->start - 1, &e);
		joins_left = mt_continues(&e, piece, t->routings);
		/* It says so already. */
		if (joins_left && e.end >= piece->end)
			return 0;
	}
	if (!joins_left)
		add[nr++] = *piece;
	if (piece->end < t->size) {
		mt_get(t->root, t->size, piece->end, &e);
		if (mt_is_placed(&t->routings[e.routing]))
			e.offset += piece->end - e.start;
		start = e.start;
		e.start = piece->end;
		/* Then it shall not begin there. */
		if (mt_continues(piece, &e, t->routings))
			hi++;
		else if (start < piece->end)
			add[nr++] = e;
	}
	/* The leaves behind the first one give what they have in the way. */
	while ((end = leaf_end(t, piece->start)) < hi) {
		ret = splice(t, end, hi, NULL, 0);
		if (ret)
			return ret;
	}
	return splice(t, piece->start, hi, add, nr);
}

void mt_begin(struct mt_change *t, struct um_map *map, uint16_t space)
{
	const struct um_view *v = map->view;

	*t = (struct mt_change){
		.map = map,
		.space = space,
		.spare = map->spare,
		.nr_spare = map->nr_spare,
		.epoch = map->epoch + 1,
	};
	map->spare = NULL;
	map->nr_spare = 0;
	t->nr_nodes = map->nr_nodes;
	if (!v)
		return;
	t->routings = v->routings;
	if (space == v->nr_spaces)
		return;
	t->root = v->spaces[space].root;
	t->size = v->spaces[space].size;
	t->flush = v->spaces[space].flush;
	t->nr_extents = v->spaces[space].nr_extents;
}

int mt_plant(struct mt_change *t, uint64_t size)
{
	int ret = reserve(t);

	if (ret)
		return ret;
	t->size = size;
	t->root = new_node(t, 0);
	t->root->nr = 1;
	t->root->keys[0] = 0;
	t->root->offset[0] = 0;
	t->root->routing[0] = 0;
	t->nr_extents = 1;
	return 0;
}

void mt_commit(struct mt_change *t)
{
	t->map->spare = t->spare;
	t->map->nr_spare = t->nr_spare;
	mt_trim(t->map, MAX_NEW_NODES);
}

void mt_recycle(struct um_map *map, struct um_dead *dead)
{
	if (map->nr_spare >= MAX_NEW_NODES) {
		free(node_of(dead));
		return;
	}
	dead->next = map->spare ? &map->spare->dead : NULL;
	map->spare = node_of(dead);
	map->nr_spare++;
}

/* Ours are reachable only through ours. */
static void drop_ours(struct mt_change *t, struct um_node *n)
{
	if (n->dead.epoch != t->epoch)
		return;
	for (unsigned int i = 0; n->level && i < n->nr; i++)
		drop_ours(t, n->child[i]);
	drop(t, n);
}

void mt_abort(struct mt_change *t)
{
	if (t->root)
		drop_ours(t, t->root);
	mt_commit(t);
}

void mt_trim(struct um_map *map, uint32_t keep)
{
	while (map->nr_spare > keep)
		free(pop_spare(&map->spare, &map->nr_spare));
}

void mt_free(struct um_node *root)
{
	for (unsigned int i = 0; root->level && i < root->nr; i++)
		mt_free(root->child[i]);
	free(root);
}
