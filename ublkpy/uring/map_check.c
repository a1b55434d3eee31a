// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "map_private.h"

struct check {
	const struct um_view *view;
	const struct um_space *space;
	uint64_t nr_nodes;
	uint64_t nr_extents;
	struct um_extent last;
};

static bool check_extent(struct check *c, const struct um_extent *e)
{
	bool placed = mt_is_placed(&c->view->routings[e->routing]);
	bool first = !c->nr_extents++;

	if (e->start % 512 || (!placed && e->offset))
		return false;
	if (!first && mt_continues(&c->last, e, c->view->routings))
		return false;
	c->last = *e;
	return true;
}

/* Whether the tree under n is sound, and covers [lo, hi). */
static bool check_node(struct check *c, const struct um_node *n, uint64_t lo,
		       uint64_t hi)
{
	bool root = n == c->space->root;

	c->nr_nodes++;
	if (n->nr > UM_FANOUT || n->nr < (root ? 1 + !!n->level : MT_MIN_FILL))
		return false;
	for (unsigned int i = n->nr; i < UM_KEYS; i++)
		if (n->keys[i] != UINT64_MAX)
			return false;
	for (unsigned int i = 0; i < n->nr; i++) {
		uint64_t end = i + 1 < n->nr ? n->keys[i + 1] : hi;
		const struct um_extent e = { n->keys[i], end, n->offset[i],
					     n->routing[i] };

		if (n->keys[i] < lo || (!i && n->keys[i] != lo) ||
		    n->keys[i] >= end)
			return false;
		if (!n->level) {
			if (!check_extent(c, &e))
				return false;
		} else if (n->child[i]->level != n->level - 1 ||
			   !check_node(c, n->child[i], n->keys[i], end)) {
			return false;
		}
	}
	return true;
}

static int check_view(const struct um_view *v, uint64_t nr_nodes)
{
	struct check c = { .view = v };

	for (unsigned int i = 0; i < v->nr_spaces; i++) {
		const struct um_space *s = c.space = &v->spaces[i];

		c.nr_extents = 0;
		if (!check_node(&c, s->root, 0, s->size) ||
		    c.nr_extents != s->nr_extents ||
		    !s->only != (s->nr_extents != 1))
			return -EUCLEAN;
	}
	return c.nr_nodes == nr_nodes ? 0 : -EUCLEAN;
}

int um_check(struct um_map *map)
{
	int ret;

	pthread_mutex_lock(&map->lock);
	ret = check_view(map->view, map->nr_nodes);
	pthread_mutex_unlock(&map->lock);
	return ret;
}

uint64_t um_probe(struct um_map *map, const uint64_t *pos, uint32_t nr,
		  uint64_t rounds)
{
	struct um_reader reader;
	uint64_t mixed = 0;

	um_reader_add(map, &reader, -1);
	for (uint64_t round = 0; round < rounds; round++) {
		const struct um_view *view;
		struct um_hit first, hit;
		bool differ = false;

		um_reader_enter(&reader);
		view = um_current(map);
		um_lookup(view, pos[0], UM_READ, &first);
		for (uint32_t i = 1; i < nr; i++) {
			um_lookup(view, pos[i], UM_READ, &hit);
			differ |= hit.kind != first.kind ||
				  hit.slot != first.slot;
		}
		um_reader_leave(&reader);
		mixed += differ;
	}
	um_reader_remove(&reader);
	return mixed;
}
