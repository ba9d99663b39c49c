/* What the shared library shows; everything else stays inside. */
#ifndef LORAFUSE_EXPORT_H
#define LORAFUSE_EXPORT_H

#if defined(__GNUC__)
#define LORAFUSE_API __attribute__((visibility("default")))
#else
#define LORAFUSE_API
#endif

#endif
