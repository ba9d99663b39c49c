/* The tasks of a bundle for any language that calls C. Every function may be called from any thread. */
#ifndef LORAFUSE_H
#define LORAFUSE_H

#include <stddef.h>
#include <stdint.h>

#include "lorafuse/export.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What a function returns: done, or refused with the reason in lorafuse_error(). */
enum { LORAFUSE_OK = 0, LORAFUSE_REFUSED = 3 };

typedef enum { LORAFUSE_DEDICATED = 0, LORAFUSE_RESIDENT = 1 } lorafuse_mode;
typedef enum { LORAFUSE_ONNXRUNTIME = 0, LORAFUSE_TENSORRT = 1, LORAFUSE_TENSORRT_RTX = 2 } lorafuse_backend;

typedef enum {
    LORAFUSE_FLOAT32,
    LORAFUSE_FLOAT16,
    LORAFUSE_BFLOAT16,
    LORAFUSE_FLOAT64,
    LORAFUSE_INT64,
    LORAFUSE_INT32,
    LORAFUSE_INT16,
    LORAFUSE_INT8,
    LORAFUSE_UINT8,
    LORAFUSE_BOOL,
    LORAFUSE_UINT16,
    LORAFUSE_UINT32,
    LORAFUSE_UINT64
} lorafuse_dtype;

/* As lorafuse::Options: zeros, and NULL for the library, are the defaults. */
typedef struct {
    lorafuse_mode mode;
    lorafuse_backend backend;
    int threads;
    uint64_t memory;
    const char* onnxruntime;
} lorafuse_options;

/* A named array, row-major and without gaps. Inputs are the caller's and are not copied. */
typedef struct {
    const char* name;
    lorafuse_dtype dtype;
    const int64_t* shape;
    size_t rank;
    const void* data;
    size_t bytes;
} lorafuse_tensor;

typedef struct lorafuse_runtime lorafuse_runtime;
typedef struct lorafuse_outputs lorafuse_outputs;

/* Why the last call on this thread was refused: one line. Valid until the next call on this thread. */
LORAFUSE_API const char* lorafuse_error(void);

/* Open a bundle; `options` may be NULL. Close it when no call is in progress; outputs may outlive it. */
LORAFUSE_API int lorafuse_open(const char* bundle, const lorafuse_options* options, lorafuse_runtime** runtime);
LORAFUSE_API void lorafuse_close(lorafuse_runtime* runtime);

/* The task at `index`, by name, and a task's class label; NULL behind the last one. They live as long as the runtime.
 */
LORAFUSE_API const char* lorafuse_task(const lorafuse_runtime* runtime, size_t index);
LORAFUSE_API const char* lorafuse_label(const lorafuse_runtime* runtime, const char* task, size_t index);

/* Run a task; with `adapted` 0, the base under the task's head. Free the outputs with lorafuse_free. */
LORAFUSE_API int lorafuse_run(lorafuse_runtime* runtime, const char* task, int adapted, const lorafuse_tensor* inputs,
                              size_t count, lorafuse_outputs** outputs);

/* The same of one part of a task whose model has several, such as two towers; NULL: the one part of a model of one.
 * The part's role at `index`, in the order of the names; NULL behind the last one. It lives as long as the runtime. */
LORAFUSE_API int lorafuse_run_part(lorafuse_runtime* runtime, const char* task, const char* part, int adapted,
                                   const lorafuse_tensor* inputs, size_t count, lorafuse_outputs** outputs);
LORAFUSE_API const char* lorafuse_part(const lorafuse_runtime* runtime, const char* task, size_t index);

LORAFUSE_API size_t lorafuse_count(const lorafuse_outputs* outputs);

/* The output at `index`, in the order of the names; its memory belongs to `outputs`. Behind the last one, its name is
 * NULL. */
LORAFUSE_API lorafuse_tensor lorafuse_output(const lorafuse_outputs* outputs, size_t index);
LORAFUSE_API void lorafuse_free(lorafuse_outputs* outputs);

#ifdef __cplusplus
}
#endif
#endif
