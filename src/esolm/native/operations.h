/* The operations of a pass over a few rows, each on one of its parts: a row, some panels of a product, a text's head.
 *
 * Every number of a row is made by the same additions in the same order whatever other rows, threads or parts there
 * are, so a row's result is the same bit for bit in any company.
 *
 * Weights of a product lie in panels of 32 outputs, [panel][input][output], so that they are read once, from front to
 * back, for all rows. They stay small in memory (float16, bfloat16, int8) and become float32 in registers.
 */
#include <math.h>
#include <stddef.h>

#include "vectors.h"

enum { PANEL = 32, VECS = PANEL / LANES, MOST_BLOCK = 512 };
enum { EMBED, NORM, PRODUCT, ROTATE, ATTEND, GATE, SUM, FIND };  /* kinds of operations */
enum { RMS = 1, ADD = 1, GELU = 2 };                                   /* flags: of a norm, of a product */
enum { EVERYTHING, CAUSAL, MASKED };                                   /* what a row reads */

typedef struct {
    int32_t kind, dtype, flags, layer, inputs, outputs, from, to; /* `from` and `to` are numbers of buffers */
    const void *weight;
    const float *scale, *bias; /* NULL: none */
} Op;

typedef struct {
    int64_t batch, rows, vocab, block; /* texts; rows of each; ids to draw from; ids summed together in a draw */
    int64_t heads, kv_heads, dim, capacity, used, reads, mask_text, mask_row; /* strides of the mask, in bytes */
    float epsilon, temperature;
    const int64_t *tokens, *positions, *slots; /* [text, row], [text, row]; the first slot of each text's rows */
    const uint8_t *mask;
    float *const *keys, *const *values; /* of each layer: [text, kv_head, capacity, dim] */
    float *const *buffers;              /* each [text, row, its width] */
    float *scores;                      /* [thread, used up to a whole vector] */
    const double *uniform;              /* [row] */
    double *sums;                       /* [row, block, 2] */
    int64_t *drawn;                     /* [row] */
} Pass;

static void embed(const Op *op, const Pass *pass, int64_t row)
{
    float *to = pass->buffers[op->to] + row * op->outputs;
    int64_t from = pass->tokens[row] * op->outputs, i = 0;
    for (; i + LANES <= op->outputs; i += LANES) store(to + i, weights(op->dtype, op->weight, from + i));
    if (i < op->outputs) { /* what is behind the last row of the table is not ours to read */
        char last[4 * LANES] = {0};
        size_t size = op->dtype == FLOAT32 ? 4 : op->dtype == INT8 ? 1 : 2;
        memcpy(last, (const char *)op->weight + (size_t)(from + i) * size, (size_t)(op->outputs - i) * size);
        store_first(to + i, weights(op->dtype, last, 0), op->outputs - i);
    }
}

INLINE void normalise(const float *from, float *to, int64_t n, const float *weight, const float *bias, int rms, float epsilon)
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
    float scale = 1.0f / sqrtf(sum(squares) / (float)n + epsilon);
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

/* Sums of `wide` panels for `rows` rows, over the inputs in their order: sums[row][panel]. */
INLINE void tile(int dtype, int wide, int rows, const Op *op, int64_t panel, const float *x, float *sums)
{
    vec acc[TILE_ROWS][2 * VECS];
    int64_t size = (int64_t)op->inputs * PANEL, at = panel * size;
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < wide * VECS; v++) acc[r][v] = (vec){0};
    for (int64_t k = 0; k < op->inputs; k++, at += PANEL) {
        vec w[2 * VECS];
#pragma GCC unroll 16
        for (int v = 0; v < wide * VECS; v++) w[v] = weights(dtype, op->weight, at + (v / VECS) * size + (v % VECS) * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            vec value = (vec){0} + x[r * op->inputs + k];
#pragma GCC unroll 16
            for (int v = 0; v < wide * VECS; v++) acc[r][v] += w[v] * value;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int v = 0; v < wide * VECS; v++) store(sums + r * 2 * PANEL + v * LANES, acc[r][v]);
}

#define TILES(dtype) \
    switch (wide * 16 + rows) { \
        case 33: tile(dtype, 2, 1, op, panel, x, sums); break; \
        case 34: tile(dtype, 2, WIDE_ROWS, op, panel, x, sums); break; \
        case 17: tile(dtype, 1, 1, op, panel, x, sums); break; \
        case 18: tile(dtype, 1, 2, op, panel, x, sums); break; \
        case 19: tile(dtype, 1, TILE_ROWS < 3 ? 1 : 3, op, panel, x, sums); break; \
        case 20: tile(dtype, 1, TILE_ROWS < 4 ? 1 : 4, op, panel, x, sums); break; \
        case 21: tile(dtype, 1, TILE_ROWS < 5 ? 1 : 5, op, panel, x, sums); break; \
        case 22: tile(dtype, 1, TILE_ROWS < 6 ? 1 : 6, op, panel, x, sums); break; \
        case 23: tile(dtype, 1, TILE_ROWS < 7 ? 1 : 7, op, panel, x, sums); break; \
        default: tile(dtype, 1, TILE_ROWS, op, panel, x, sums); break; \
    }

static void tile_of(int wide, int rows, const Op *op, int64_t panel, const float *x, float *sums)
{
    switch (op->dtype) {
    case FLOAT32: TILES(FLOAT32) break;
    case FLOAT16: TILES(FLOAT16) break;
    case BFLOAT16: TILES(BFLOAT16) break;
    default: TILES(INT8)
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

static void product(const Op *op, const Pass *pass, int64_t first, int64_t last) /* panels */
{
    int64_t rows = pass->batch * pass->rows, blocks = (rows + TILE_ROWS - 1) / TILE_ROWS;
    float sums[TILE_ROWS * 2 * PANEL];
    for (int64_t panel = first; panel < last;) {
        int wide = rows <= WIDE_ROWS && panel + 1 < last ? 2 : 1;
        for (int64_t b = 0; b < blocks; b++) {
            int64_t row = rows * b / blocks, count = rows * (b + 1) / blocks - row;
            const float *x = pass->buffers[op->from] + row * op->inputs;
            tile_of(wide, (int)count, op, panel, x, sums);
            for (int64_t r = 0; r < count; r++)
                for (int p = 0; p < wide; p++)
                    finish(op, sums + (2 * r + p) * PANEL, (panel + p) * PANEL, pass->buffers[op->to] + (row + r) * op->outputs);
        }
        panel += wide;
    }
}

/* Queries and keys of a row turned to their places; keys and values into their slots. */
static void turn(const Op *op, const Pass *pass, int64_t row)
{
    int64_t dim = pass->dim, half = dim / 2, heads = pass->heads, kv = pass->kv_heads, text = row / pass->rows;
    const float *cos = (const float *)op->weight + 2 * dim * pass->positions[row], *sin = cos + dim;
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
    int64_t slot = pass->slots[text] + row % pass->rows;
    for (int64_t head = 0; head < kv; head++) {
        int64_t at = ((text * kv + head) * pass->capacity + slot) * dim;
        memcpy(pass->keys[op->layer] + at, x + head * dim, (size_t)dim * sizeof(float));
        memcpy(pass->values[op->layer] + at, x + (kv + head) * dim, (size_t)dim * sizeof(float));
    }
}

/* Attention of one row's head: scores of what it reads, their softmax, the mean of the values. */
static void attend_row(const Pass *pass, const float *q, const float *keys, const float *values, const uint8_t *mask,
                       int64_t count, float *scores, float *to)
{
    int64_t dim = pass->dim;
    float scale = 1.0f / sqrtf((float)dim);
    vec most = (vec){0} - INFINITY, total = {0};
    for (int64_t j = 0; j < count; j++) {
        if (mask && !mask[j]) { scores[j] = -INFINITY; continue; }
        vec dots = {0};
        for (int64_t i = 0; i < dim; i += LANES) dots += load_first(q + i, dim - i) * load_first(keys + j * dim + i, dim - i);
        scores[j] = sum(dots) * scale;
    }
    for (int64_t j = count; j % LANES; j++) scores[j] = -INFINITY;
    for (int64_t j = 0; j < count; j += LANES) most = larger(load(scores + j), most);
    float top = largest(most);
    if (top == -INFINITY) top = 0;
    for (int64_t j = 0; j < count; j += LANES) {
        vec p = exponential(load(scores + j) - top);
        total += p;
        store(scores + j, p);
    }
    float whole = sum(total);
    for (int64_t i = 0; i < dim; i += LANES) {
        vec mean = {0};
        for (int64_t j = 0; j < count; j++) mean += scores[j] * load_first(values + j * dim + i, dim - i);
        store_first(to + i, mean / whole, dim - i);
    }
}

static void attend(const Op *op, const Pass *pass, int64_t chunk, int thread) /* a text's head of keys and values */
{
    int64_t text = chunk / pass->kv_heads, head = chunk % pass->kv_heads, group = pass->heads / pass->kv_heads, dim = pass->dim;
    const float *keys = pass->keys[op->layer] + chunk * pass->capacity * dim;
    const float *values = pass->values[op->layer] + chunk * pass->capacity * dim;
    float *scores = pass->scores + thread * ((pass->used + LANES - 1) / LANES * LANES);
    for (int64_t r = 0; r < pass->rows; r++) {
        int64_t row = text * pass->rows + r, count = pass->reads == CAUSAL ? r + 1 : pass->used;
        const uint8_t *mask = pass->reads == MASKED ? pass->mask + text * pass->mask_text + r * pass->mask_row : NULL;
        const float *q = pass->buffers[op->from] + row * (pass->heads + 2 * pass->kv_heads) * dim;
        float *to = pass->buffers[op->to] + row * pass->heads * dim;
        for (int64_t h = head * group; h < (head + 1) * group; h++)
            attend_row(pass, q + h * dim, keys, values, mask, count, scores, to + h * dim);
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

/* The largest of n logits over the temperature, and e^(each - it), zeros behind them. */
static float weigh(const float *x, int64_t n, float temperature, float *w)
{
    vec most = (vec){0} - INFINITY;
    for (int64_t i = 0; i < n; i += LANES) {
        vec v = (vec){0} - INFINITY;
        memcpy(&v, x + i, (size_t)(n - i < LANES ? n - i : LANES) * sizeof(float));
        v /= temperature;
        most = larger(v, most);
        store(w + i, v);
    }
    float top = largest(most);
    for (int64_t i = 0; i < n; i += LANES) store(w + i, exponential(load(w + i) - (top == -INFINITY ? 0 : top)));
    return top;
}

/* A draw, first half: of each block of ids the largest logit, and the sum of e^(logit - it). The last id is the mask. */
static void add_up(const Op *op, const Pass *pass, int64_t item)
{
    int64_t blocks = (pass->vocab + pass->block - 1) / pass->block, first = item % blocks * pass->block;
    int64_t n = pass->vocab - first < pass->block ? pass->vocab - first : pass->block;
    const float *x = pass->buffers[op->from] + item / blocks * (pass->vocab + 1) + first;
    float w[MOST_BLOCK];
    double part[8] = {0}, *to = pass->sums + 2 * item;
    float top = weigh(x, n, pass->temperature, w);
    for (int64_t i = 0; i < n; i += LANES)
        for (int j = 0; j < LANES; j++) part[j % 8] += (double)w[i + j];
    to[0] = top;
    to[1] = ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

/* Second half: the block in which the cumulative sum exceeds the row's number, then the id; -1 if there is none. */
static void find(const Op *op, const Pass *pass, int64_t row)
{
    int64_t blocks = (pass->vocab + pass->block - 1) / pass->block, block = 0, id = -1;
    double *sums = pass->sums + 2 * blocks * row, top = -INFINITY, whole = 0, before = 0;
    for (int64_t b = 0; b < blocks; b++) top = sums[2 * b] > top ? sums[2 * b] : top;
    for (int64_t b = 0; b < blocks; b++) whole += sums[2 * b + 1] *= exp(sums[2 * b] - top);
    pass->drawn[row] = -1;
    if (!(whole > 0) || !(whole < INFINITY)) return;
    double goal = pass->uniform[row] * whole;
    for (int64_t b = 0; b < blocks; b++) {
        if (sums[2 * b + 1] <= 0) continue;
        if (id >= 0) before += sums[2 * block + 1];
        block = b, id = b * pass->block; /* the last block that has weight, should rounding pass over all */
        if (before + sums[2 * b + 1] > goal) break;
    }
    int64_t first = id, n = pass->vocab - first < pass->block ? pass->vocab - first : pass->block;
    float w[MOST_BLOCK];
    weigh(pass->buffers[op->from] + row * (pass->vocab + 1) + first, n, pass->temperature, w);
    double scale = exp(sums[2 * block] - top);
    for (int64_t i = 0; i < n; i++) {
        if (!(w[i] > 0)) continue;
        id = first + i;
        if ((before += (double)w[i] * scale) > goal) break;
    }
    pass->drawn[row] = id;
}
