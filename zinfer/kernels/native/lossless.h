/* Weights that are packed without loss.  Python side: zinfer.kernels.native.calls; the format: zinfer.spec.lossless. */
#ifndef ZINFER_LOSSLESS_H
#define ZINFER_LOSSLESS_H

#include "common.h"

#define SHARED 16                         /* outputs that share a list of exponents */
#define HEAD (SHARED + 2 * SHARED)        /* bytes in front of the exceptions: the list, where each output's begin */
#define EXCEPTION (SHARED - 1)            /* the code of a weight whose exponent is not on the list */
#define ROOM(inputs) (HEAD + (inputs) / 8) /* bytes of a list with its exceptions */

typedef struct {
    const uint8_t *rest, *codes, *exponents;
    size_t inputs; /* a multiple of 64 */
} lossless_t;

/* Outputs [start, stop) as bfloat16, one after the other. */
void zinfer_unpack_rows(const lossless_t *from, bf16 *to, size_t start, size_t stop);

#endif
