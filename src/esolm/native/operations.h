/* The operations of a pass over a few rows, each on one of its parts: a row, some panels of a product, a text's head.
 *
 * Every number of a row is made by the same additions in the same order whatever other rows, threads or parts there
 * are, so a row's result is the same bit for bit in any company.
 *
 * Weights of a product lie in panels of 32 outputs, [panel][input][output], so that they are read once, from front to
 * back, for all rows. They stay small in memory (float16, bfloat16, int8) and become float32 in registers; but PAIRS,
 * [panel][input / 2][output][2], are multiplied as they are, by rows that are rounded to bfloat16 too.
 */
#include <math.h>
#include <stddef.h>

#include "vectors.h"

enum { PANEL = 32, VECS = PANEL / LANES, QUERIES = 2, CHUNK = 4 };
enum { DEEP = 128, GROUP = 48, BLOCK = 512 }; /* inputs and rows of a product taken together; ids summed in a draw */
enum { EMBED, NORM, PRODUCT, ROTATE, TAKE, ATTEND, GATE, SUM, FIND }; /* kinds of operations */
enum { RMS = 1, ADD = 1, GELU = 2 };                 /* flags: of a norm, of a product */

typedef struct {
    int32_t kind, dtype, flags, layer, inputs, outputs, from, to; /* `from` and `to` are numbers of buffers */
    int32_t pass, unused;                                         /* on which of the passes of a call it works */
    const void *weight;
    const float *scale, *bias; /* NULL: none */
} Op;

typedef struct {
    int64_t batch, rows, count, heads, kv_heads, dim;               /* texts, places for rows of each, rows in all; heads */
    int64_t capacity, used, mask_text, mask_row;                    /* slots; strides of the mask, in bytes */
    double epsilon;
    const int64_t *at, *starts;                                     /* the place text * rows + row of each row; each text's first */
    const int64_t *taken;                                           /* which rows of the pass before these are */
    const int64_t *tokens, *positions, *slots;                      /* [text, row] twice; the first slot of each text */
    const uint8_t *mask;                                            /* [text, row, slot]: is it read? */
    void *const *keys, *const *values;                              /* of each layer: [text, kv_head, capacity, dim], in whole vectors */
    float *const *buffers;                                          /* each [row of all, its width] */
    float *scores;                                                  /* [thread, QUERIES, used up to a whole vector] */
    double temperature;
    const double *uniform;                                          /* [row] */
    double *sums;                                                   /* [row, block of ids, 2] */
    int64_t *drawn;                                                 /* [row] */
} Pass;

static int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; } /* up to a whole vector */

static void embed(const Op *op, const Pass *pass, int64_t row)
{
    float *to = pass->buffers[op->to] + row * op->outputs;
    int64_t from = pass->tokens[pass->at[row]] * op->outputs, i = 0;
    for (; i + LANES <= op->outputs; i += LANES) store(to + i, weights(op->dtype, op->weight, from + i));
    if (i < op->outputs) { /* what is behind the last row of the table is not ours to read */
        char last[4 * LANES] = {0};
        size_t size = (size_t)size_of(op->dtype);
        memcpy(last, (const char *)op->weight + (size_t)(from + i) * size, (size_t)(op->outputs - i) * size);
        store_first(to + i, weights(op->dtype, last, 0), op->outputs - i);
    }
}

INLINE void normalise(const float *from, float *to, int64_t n, const float *weight, const float *bias, int rms, double epsilon)
{
    vec total = {0}, squares = {0};
    float mean = 0;
    if (!rms) {
        for (int64_t i = 0; i < n; i += LANES) total += load_first(from + i, n - i);
        mean = sum(total) / (float)n;
    }
    vec middle = (vec){0} + mean;
    for (int64_t i = 0; i < n; i += LANES) {
        vec x = load_first(from + i, n - i) - load_first((const float *)&middle, n - i);
        squares += x * x;
    }
    float scale = 1.0f / sqrtf(sum(squares) / (float)n + (float)epsilon);
    for (int64_t i = 0; i < n; i += LANES) {
        vec y = (load_first(from + i, n - i) - middle) * scale * load_first(weight + i, n - i);
        store_first(to + i, bias ? y + load_first(bias + i, n - i) : y, n - i);
    }
}

static void norm(const Op *op, const Pass *pass, int64_t row)
{
    const float *from = pass->buffers[op->from] + row * op->outputs;
    normalise(from, pass->buffers[op->to] + row * op->outputs, op->outputs, op->weight, op->bias, op->flags & RMS, pass->epsilon);
}

/* Ask for the weights that a product comes to soon: those of one input. */
INLINE void ask_weights(int dtype, const void *weight, int64_t at)
{
    const char *first = (const char *)weight + at * size_of(dtype);
    for (int byte = 0; byte < size_of(dtype) * PANEL; byte += LINE) ask_ahead(first + byte);
}

/* Add to the sums [row][output] of a panel what `deep` of its inputs give `rows` rows, in the order of the inputs. */
INLINE void tile(int dtype, int rows, const void *weight, int64_t at, int64_t deep, const float *x, int64_t apart, float *sums)
{
    vec total[TILE_ROWS][VECS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECS; v++) total[r][v] = load(sums + r * PANEL + v * LANES);
    for (int64_t k = 0; k < deep; k++, at += PANEL) {
        ask_weights(dtype, weight, at);
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++) {
            vec w = weights(dtype, weight, at + v * LANES);
            keep_nothing(dtype);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) total[r][v] = add_weighted(dtype, total[r][v], w, x[r * apart + k]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECS; v++) store(sums + r * PANEL + v * LANES, total[r][v]);
}

#define ROWS(dtype, n) case n: tile(dtype, n <= TILE_ROWS ? n : 1, weight, at, deep, x, apart, sums); break;
#define TILES(dtype) \
    switch (rows) { ROWS(dtype, 1) ROWS(dtype, 2) ROWS(dtype, 3) ROWS(dtype, 4) \
                    ROWS(dtype, 5) ROWS(dtype, 6) ROWS(dtype, 7) ROWS(dtype, 8) } break;

static void tile_of(int dtype, int rows, const void *weight, int64_t at, int64_t deep, const float *x, int64_t apart, float *sums)
{
    switch (dtype) {
    case FLOAT32: TILES(FLOAT32)
    case FLOAT16: TILES(FLOAT16)
    case BFLOAT16: TILES(BFLOAT16)
    case INT8: TILES(INT8)
    default: TILES(PAIRS)
    }
}

/* What follows the sums of a panel for one row: scale, bias, GELU, the residual. */
static void finish(const Op *op, const float *sums, int64_t first, float *to)
{
    for (int64_t i = first; i < first + PANEL && i < op->outputs; i += LANES) {
        int64_t n = op->outputs - i;
        vec y = load(sums + (i - first));
        if (op->scale) y *= load_first(op->scale + i, n);
        if (op->bias) y += load_first(op->bias + i, n);
        if (op->flags & GELU) y = gelu(y);
        if (op->flags & ADD) y += load_first(to + i, n);
        store_first(to + i, y, n);
    }
}

/* Sums of a panel for a group of rows. Where they are many, weights become floats once, a piece that the nearest cache
 * holds, and all of the group use it. */
static void sums_of_group(const Op *op, int64_t panel, const float *x, int64_t rows, float *sums)
{
    _Alignas(64) float piece[DEEP * PANEL], words[GROUP * DEEP];
    int pairs = op->dtype == PAIRS, direct = pairs || op->dtype == FLOAT32;
    int64_t blocks = (rows + TILE_ROWS - 1) / TILE_ROWS, inputs = pairs ? (op->inputs + 1) / 2 : op->inputs;
    int64_t most = pairs || blocks > 2 ? DEEP : inputs, widen = blocks > 2 && !direct;
    for (int64_t first = 0; first < inputs; first += most) {
        int64_t deep = inputs - first < most ? inputs - first : most, at = (panel * inputs + first) * PANEL;
        if (widen)
            for (int64_t i = 0; i < deep * PANEL; i += LANES) {
                if (i % PANEL == 0) ask_weights(op->dtype, op->weight, at + i);
                store(piece + i, weights(op->dtype, op->weight, at + i));
            }
        if (pairs)
            for (int64_t r = 0; r < rows; r++) {
                int64_t left = op->inputs - 2 * first;
                pair(x + r * op->inputs + 2 * first, left < 2 * deep ? left : 2 * deep, words + r * DEEP);
            }
        const float *from = pairs ? words : x + first;
        int64_t apart = pairs ? DEEP : op->inputs;
        for (int64_t b = 0; b < blocks; b++) {
            int64_t row = rows * b / blocks, count = rows * (b + 1) / blocks - row;
            tile_of(widen ? FLOAT32 : op->dtype, (int)count, widen ? piece : op->weight, widen ? 0 : at, deep,
                    from + row * apart, apart, sums + row * PANEL);
        }
    }
}

static void product(const Op *op, const Pass *pass, int64_t panel)
{
    int64_t rows = pass->count;
    for (int64_t row = 0; row < rows; row += GROUP) {
        _Alignas(64) float sums[GROUP * PANEL];
        int64_t count = rows - row < GROUP ? rows - row : GROUP;
        memset(sums, 0, (size_t)(count * PANEL) * sizeof(float));
        const float *x = pass->buffers[op->from] + row * op->inputs;
        sums_of_group(op, panel, x, count, sums);
        for (int64_t r = 0; r < count; r++)
            finish(op, sums + r * PANEL, panel * PANEL, pass->buffers[op->to] + (row + r) * op->outputs);
    }
}

/* Queries and keys of a row turned to their places; keys and values into their slots. */
static void turn(const Op *op, const Pass *pass, int64_t row)
{
    int64_t dim = pass->dim, half = dim / 2, heads = pass->heads, kv = pass->kv_heads, text = pass->at[row] / pass->rows;
    const float *cos = (const float *)op->weight + 2 * dim * pass->positions[pass->at[row]], *sin = cos + dim;
    float *x = pass->buffers[op->from] + row * (heads + 2 * kv) * dim;
    for (int64_t head = 0; head < heads + kv; head++, x += dim) {
        const float *weight = head < heads ? op->scale : op->bias;
        if (weight) normalise(x, x, dim, weight, NULL, RMS, pass->epsilon);
        for (int64_t i = 0; i < half; i++) {
            float a = x[i], b = x[i + half];
            x[i] = a * cos[i] + b * sin[i];
            x[i + half] = b * cos[i + half] + a * sin[i + half];
        }
    }
    x -= kv * dim;
    int64_t slot = pass->slots[text] + pass->at[row] % pass->rows, deep = whole(dim);
    for (int64_t head = 0; head < kv; head++) {
        int64_t at = ((text * kv + head) * pass->capacity + slot) * deep;
        for (int64_t i = 0; i < dim; i += LANES) {
            put(op->dtype, pass->keys[op->layer], at + i, load_first(x + head * dim + i, dim - i));
            put(op->dtype, pass->values[op->layer], at + i, load_first(x + (kv + head) * dim + i, dim - i));
        }
    }
}

/* A row of the pass before: those that nobody asked for are left behind. */
static void take(const Op *op, const Pass *pass, int64_t row)
{
    const float *from = pass[-1].buffers[op->from] + pass->taken[row] * op->outputs;
    memcpy(pass->buffers[op->to] + row * op->outputs, from, (size_t)op->outputs * sizeof(float));
}

typedef struct { /* one row's head: what it asks, which slots it reads, where its answer goes */
    const float *q;
    const uint8_t *mask;
    int64_t used; /* slots up to the last one that it reads */
    float *scores, *to, total;
} Query;

/* Scores of the slots from j on, -infinity where the query does not read. */
INLINE vec where_read(const Query *query, int64_t j, vec scores)
{
    char last[LANES] = {0}; /* what is behind the last slot is not ours to read */
    if (j + LANES > query->used) memcpy(last, query->mask + j, (size_t)(query->used - j));
    const void *mask = j + LANES > query->used ? last : (const char *)query->mask + j;
    return pick(weights(INT8, mask, 0) > 0.0f, scores, (vec){0} - INFINITY);
}

/* Scores of `n` queries that share their keys: each key is read once for all of them. */
INLINE void score(int dtype, const Query *query, int n, const char *keys, int64_t dim, int64_t used)
{
    float scale = 1.0f / sqrtf((float)dim);
    for (int64_t j = 0, at = 0; j < used; j += LANES) {
        float dots[QUERIES][LANES];
        for (int lane = 0; lane < LANES; lane++) {
            vec dot[QUERIES] = {0};
            for (int64_t i = 0; i < dim; i += LANES, at += LANES) {
                ask_ahead(keys + at * size_of(dtype));
                vec k = weights(dtype, keys, at);
                for (int r = 0; r < n; r++) dot[r] = add_product(dot[r], load_first(query[r].q + i, dim - i), k);
            }
            for (int r = 0; r < n; r++) dots[r][lane] = sum(dot[r]);
        }
        for (int r = 0; r < n; r++) store(query[r].scores + j, where_read(query + r, j, load(dots[r]) * scale));
    }
}

/* Scores to weights e^(score - the largest); their sum. Compiled once, for any number of queries. */
static __attribute__((noinline)) float soften(float *scores, int64_t used)
{
    vec most = (vec){0} - INFINITY, total = {0};
    for (int64_t j = 0; j < used; j += LANES) most = larger(load(scores + j), most);
    float top = largest(most);
    if (top == -INFINITY) top = 0;
    for (int64_t j = 0; j < used; j += LANES) {
        vec p = exponential(load(scores + j) - top);
        total += p;
        store(scores + j, p);
    }
    return sum(total);
}

/* Means of the values under the weights of `n` queries: some vectors of them, from number `first` on. */
INLINE void mix(int dtype, const Query *query, int n, const char *values, int64_t dim, int64_t used, int64_t first, int vecs)
{
    vec mean[QUERIES][CHUNK] = {{{0}}};
    for (int64_t j = 0, at = first; j < used; j++, at += whole(dim))
        for (int c = 0; c < vecs; c++) {
            ask_ahead(values + (at + c * LANES) * size_of(dtype));
            vec v = weights(dtype, values, at + c * LANES);
            for (int r = 0; r < n; r++) mean[r][c] = add_product(mean[r][c], v, all(query[r].scores[j]));
        }
    for (int r = 0; r < n; r++)
        for (int64_t c = 0, at = first; c < vecs; c++, at += LANES)
            store_first(query[r].to + at, mean[r][c] / query[r].total, dim - at);
}

INLINE void answer(int dtype, Query *query, int n, const char *keys, const char *values, int64_t dim, int64_t used)
{
    int64_t first = 0;
    score(dtype, query, n, keys, dim, used);
    for (int r = 0; r < n; r++) query[r].total = soften(query[r].scores, used);
    for (; first + CHUNK * LANES <= dim; first += CHUNK * LANES) mix(dtype, query, n, values, dim, used, first, CHUNK);
    for (; first < dim; first += LANES) mix(dtype, query, n, values, dim, used, first, 1);
}

static void answer_of(int dtype, Query *query, int n, const char *keys, const char *values, int64_t dim)
{
    int64_t used = 0;
    for (int r = 0; r < n; r++) used = query[r].used > used ? query[r].used : used;
    for (int r = 0; r < n; r++) query[r].used = used;
    if (dtype == FLOAT32 && n == 1) answer(FLOAT32, query, 1, keys, values, dim, used);
    else if (dtype == FLOAT32) answer(FLOAT32, query, QUERIES, keys, values, dim, used);
    else if (n == 1) answer(FLOAT16, query, 1, keys, values, dim, used);
    else answer(FLOAT16, query, QUERIES, keys, values, dim, used);
}

static void attend(const Op *op, const Pass *pass, int64_t chunk, int thread) /* a text's head of keys and values */
{
    int64_t text = chunk / pass->kv_heads, head = chunk % pass->kv_heads, group = pass->heads / pass->kv_heads, dim = pass->dim;
    int64_t first = chunk * pass->capacity * whole(dim) * size_of(op->dtype);
    const char *keys = (const char *)pass->keys[op->layer] + first, *values = (const char *)pass->values[op->layer] + first;
    int64_t wide = whole(pass->used), start = pass->starts[text];
    int64_t queries = (pass->starts[text + 1] - start) * group;
    Query query[QUERIES];
    for (int64_t i = 0, n = 0; i < queries; i++) {
        int64_t row = start + i / group, r = pass->at[row] % pass->rows, h = head * group + i % group, used = pass->used;
        const uint8_t *mask = pass->mask + text * pass->mask_text + r * pass->mask_row;
        while (used && !mask[used - 1]) used--;
        query[n] = (Query){
            .q = pass->buffers[op->from] + (row * (pass->heads + 2 * pass->kv_heads) + h) * dim,
            .mask = mask,
            .used = used,
            .scores = pass->scores + (thread * QUERIES + n) * wide,
            .to = pass->buffers[op->to] + (row * pass->heads + h) * dim,
        };
        if (++n < QUERIES && i + 1 < queries) continue;
        answer_of(op->dtype, query, (int)n, keys, values, dim);
        n = 0;
    }
}

static void gate(const Op *op, const Pass *pass, int64_t row) /* [gate | up] -> silu(gate) up */
{
    const float *x = pass->buffers[op->from] + row * 2 * op->outputs;
    float *to = pass->buffers[op->to] + row * op->outputs;
    for (int64_t i = 0; i < op->outputs; i += LANES) {
        int64_t n = op->outputs - i;
        store_first(to + i, silu(load_first(x + i, n)) * load_first(x + op->outputs + i, n), n);
    }
}
