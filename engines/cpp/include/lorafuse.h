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
    const char* digest; /* pins the bundle, "sha256:..."; NULL: any bundle */
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

/* An input of a task. A dimension is its size, or -1 and the name of a dynamic axis; the name of another is NULL. */
typedef struct {
    const char* name;
    lorafuse_dtype dtype;
    const int64_t* sizes;
    const char* const* axes;
    size_t rank;
} lorafuse_port;

typedef struct lorafuse_runtime lorafuse_runtime;
typedef struct lorafuse_use lorafuse_use;
typedef struct lorafuse_outputs lorafuse_outputs;

/* Why the last call on this thread was refused: one line. Valid until the next call on this thread.
 * A call that is refused leaves NULL in what it would have made: a runtime, a use, outputs. */
LORAFUSE_API const char* lorafuse_error(void);

/* Open a bundle; `options` may be NULL. Closing it waits for nothing: outputs and tasks in use may outlive it, and the
 * last of them gives the memory back. Texts and shapes that the runtime gave are gone with it. No call may be about to
 * begin, and neither may be called from a signal's handler, as nothing that frees memory may: set a flag there. */
LORAFUSE_API int lorafuse_open(const char* bundle, const lorafuse_options* options, lorafuse_runtime** runtime);
LORAFUSE_API void lorafuse_close(lorafuse_runtime* runtime);

/* The manifest's SHA-256, "sha256:...", as it was when the runtime was opened, or reloaded last; NULL of no runtime. */
LORAFUSE_API const char* lorafuse_digest(lorafuse_runtime* runtime);

/* Take the bundle as it is now: what is in use ends on what it began with, and tasks that are as they were stay loaded.
 * `digest` pins what is taken, and must be given where the runtime was opened with one; else it may be NULL. Refused,
 * the runtime goes on as before. */
LORAFUSE_API int lorafuse_reload(lorafuse_runtime* runtime, const char* digest);

/* Load a task now; give its memory back, now or when those who use it are done. */
LORAFUSE_API int lorafuse_preload(lorafuse_runtime* runtime, const char* task);
LORAFUSE_API int lorafuse_evict(lorafuse_runtime* runtime, const char* task);

/* The task at `index`, by name, and a task's class label; NULL behind the last one. Like all texts and shapes that a
 * runtime gives, they live as long as it. */
LORAFUSE_API const char* lorafuse_task(lorafuse_runtime* runtime, size_t index);
LORAFUSE_API const char* lorafuse_label(lorafuse_runtime* runtime, const char* task, size_t index);

/* The input at `index` of a task's part (NULL: the one part of a model of one); behind the last one, or where there is
 * no such task or part, its name is NULL. */
LORAFUSE_API lorafuse_port lorafuse_input(lorafuse_runtime* runtime, const char* task, const char* part, size_t index);

/* Run a task; with `adapted` 0, the base under the task's head. Free the outputs with lorafuse_free. */
LORAFUSE_API int lorafuse_run(lorafuse_runtime* runtime, const char* task, int adapted, const lorafuse_tensor* inputs,
                              size_t count, lorafuse_outputs** outputs);

/* The same of one part of a task whose model has several, such as two towers; NULL: the one part of a model of one.
 * The part's role at `index`, in the order of the names; NULL behind the last one. It lives as long as the runtime. */
LORAFUSE_API int lorafuse_run_part(lorafuse_runtime* runtime, const char* task, const char* part, int adapted,
                                   const lorafuse_tensor* inputs, size_t count, lorafuse_outputs** outputs);
LORAFUSE_API const char* lorafuse_part(lorafuse_runtime* runtime, const char* task, size_t index);

/* Keep a task loaded until it is released, which may be after the runtime was closed; and run a part of it. */
LORAFUSE_API int lorafuse_begin(lorafuse_runtime* runtime, const char* task, int adapted, lorafuse_use** use);
LORAFUSE_API int lorafuse_run_use(const lorafuse_use* use, const char* part, const lorafuse_tensor* inputs,
                                  size_t count, lorafuse_outputs** outputs);
LORAFUSE_API void lorafuse_end(lorafuse_use* use);

LORAFUSE_API size_t lorafuse_count(const lorafuse_outputs* outputs);

/* The output at `index`, in the order of the names; its memory belongs to `outputs`. Behind the last one, its name is
 * NULL. */
LORAFUSE_API lorafuse_tensor lorafuse_output(const lorafuse_outputs* outputs, size_t index);
LORAFUSE_API void lorafuse_free(lorafuse_outputs* outputs);

#ifdef __cplusplus
}
#endif
#endif
