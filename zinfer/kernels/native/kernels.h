/* The kernels of this library, as each other's files see them.  Python side: zinfer.kernels.native.calls. */
#ifndef ZINFER_KERNELS_H
#define ZINFER_KERNELS_H

#include "common.h"

void zinfer_norm(const bf16 *x, const bf16 *weight, bf16 *y, double eps, size_t rows, size_t width,
                 unsigned num_threads);
void zinfer_layer_norm(const bf16 *x, const bf16 *weight, const bf16 *bias, bf16 *y, double eps, size_t rows,
                       size_t width, unsigned num_threads);
void zinfer_rotate(const bf16 *x, const bf16 *cosines, const bf16 *sines, bf16 *y, size_t row_stride,
                   size_t head_stride, size_t rows, size_t heads, size_t dim, size_t half, unsigned num_threads);
void zinfer_attend(const bf16 *q, const bf16 *keys, const bf16 *values, const int32_t *table,
                   const int32_t *lengths, bf16 *y, double scale, double cap, size_t window, size_t table_stride,
                   size_t rows, size_t heads, size_t kv_heads, size_t dim, size_t page, unsigned num_threads);
void zinfer_attend_tiles(const bf16 *q, const bf16 *keys, const bf16 *values, const int32_t *table,
                         const int32_t *lengths, const int32_t *tiles, const int32_t *lines, bf16 *y,
                         double scale, double cap, size_t window, size_t table_stride, size_t num_tiles,
                         size_t heads, size_t kv_heads, size_t dim, size_t page, unsigned num_threads);
void zinfer_activate(const bf16 *x, const bf16 *table, bf16 *y, size_t count, unsigned num_threads);
void zinfer_gate(const bf16 *gate, const bf16 *up, const bf16 *table, bf16 *y, size_t gate_stride, size_t up_stride,
                 size_t rows, size_t width, unsigned num_threads);
void zinfer_largest(const float *x, int64_t *ids, float *tops, size_t rows, size_t width, unsigned num_threads);
void zinfer_unpack(const uint8_t *rest, const uint8_t *codes, const uint8_t *exponents, bf16 *y, size_t outputs,
                   size_t inputs, unsigned num_threads);
void zinfer_pack(const bf16 *x, uint8_t *rest, uint8_t *codes, uint8_t *exponents, int64_t *most, size_t outputs,
                 size_t inputs, unsigned num_threads);
int zinfer_has_products(void);
#ifdef __AVX512BF16__
void zinfer_dense(const bf16 *x, const bf16 *weight, const bf16 *bias, void *y, bf16 *scratch, size_t rows,
                  size_t outputs, size_t inputs, size_t stride, size_t is_wide, unsigned num_threads);
void zinfer_lossless(const bf16 *x, const uint8_t *rest, const uint8_t *codes, const uint8_t *exponents, const bf16 *bias,
                     void *y, bf16 *scratch, size_t rows, size_t outputs, size_t inputs, size_t stride, size_t is_wide,
                     unsigned num_threads);
void zinfer_columns(const bf16 *x, const bf16 *weight, const bf16 *bias, bf16 *y, size_t rows, size_t outputs,
                    size_t inputs, unsigned num_threads);
void zinfer_quant(const bf16 *x, const uint8_t *nibbles, const uint8_t *low, const bf16 *scales, bf16 *y,
                  void *scratch, size_t rows, size_t outputs, size_t inputs, size_t half, size_t num_panels,
                  unsigned num_threads);
#endif

#endif
