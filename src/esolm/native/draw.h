/* A draw from logits in two operations, so that no float64 array as long as the vocabulary is made: sums over blocks of ids
 * by as many threads as there are, then a search in one block.
 */
#include "operations.h"

/* The largest of n logits over the temperature, and e^(each - it), zeros behind them. */
INLINE float weigh(const float *x, int64_t n, double temperature, float *w)
{
    vec most = (vec){0} - INFINITY;
    float over = (float)(1 / temperature);
    for (int64_t i = 0; i < n; i += LANES) {
        vec v = load_first(x + i, n - i) * over;
        for (int64_t lane = n - i; lane < LANES; lane++) v[lane] = -INFINITY;
        most = larger(v, most);
        store(w + i, v);
    }
    float top = largest(most);
    for (int64_t i = 0; i < n; i += LANES) store(w + i, exponential(load(w + i) - (top == -INFINITY ? 0 : top)));
    return top;
}

/* Ids of a row that may be drawn: all but the last, the mask. */
static int64_t ids(const Op *op) { return op->outputs - 1; }
static int64_t blocks_of(const Op *op) { return (ids(op) + BLOCK - 1) / BLOCK; }

/* A draw, first half: of each block of ids the largest logit, and the sum of e^(logit - it). */
static void add_up(const Op *op, const Pass *pass, int64_t item)
{
    int64_t blocks = blocks_of(op), first = item % blocks * BLOCK, n = ids(op) - first < BLOCK ? ids(op) - first : BLOCK;
    float w[BLOCK];
    double part[LANES] = {0}, *to = pass->sums + 2 * item;
    to[0] = weigh(pass->buffers[op->from] + item / blocks * op->outputs + first, n, pass->temperature, w);
    for (int64_t i = 0; i < n; i += LANES)
        for (int j = 0; j < LANES; j++) part[j] += (double)w[i + j];
    to[1] = 0;
    for (int j = 0; j < LANES; j++) to[1] += part[j];
}

/* Second half: the block in which the cumulative sum exceeds the row's number, then the id; -1 if there is none. */
static void find(const Op *op, const Pass *pass, int64_t row)
{
    int64_t blocks = blocks_of(op), block = 0, id = -1;
    double *sums = pass->sums + 2 * blocks * row, top = -INFINITY, whole = 0, before = 0;
    for (int64_t b = 0; b < blocks; b++) top = sums[2 * b] > top ? sums[2 * b] : top;
    for (int64_t b = 0; b < blocks; b++) whole += sums[2 * b + 1] *= exp(sums[2 * b] - top);
    pass->drawn[row] = -1;
    if (!(whole > 0) || !(whole < INFINITY)) return;
    double goal = pass->uniform[row] * whole;
    for (int64_t b = 0; b < blocks; b++) {
        if (sums[2 * b + 1] <= 0) continue;
        if (id >= 0) before += sums[2 * block + 1];
        block = b, id = b * BLOCK; /* the last block that has weight, should rounding pass over all */
        if (before + sums[2 * b + 1] > goal) break;
    }
    int64_t first = id, n = ids(op) - first < BLOCK ? ids(op) - first : BLOCK;
    float w[BLOCK];
    weigh(pass->buffers[op->from] + row * op->outputs + first, n, pass->temperature, w);
    double scale = exp(sums[2 * block] - top);
    for (int64_t i = 0; i < n; i++) {
        if (!(w[i] > 0)) continue;
        id = first + i;
        if ((before += (double)w[i] * scale) > goal) break;
    }
    pass->drawn[row] = id;
}
