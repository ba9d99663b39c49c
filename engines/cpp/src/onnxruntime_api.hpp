// ONNX Runtime's C API: the official header where it is given, else a declaration of our own of what is called here.
//
// The API is one table of functions, to whose end new versions append; what has shipped is never moved
// (https://github.com/microsoft/onnxruntime, onnxruntime/core/session/onnxruntime_c_api.cc). Each entry below is held
// to its place.
#pragma once

#ifdef LORAFUSE_ONNXRUNTIME_HEADER

#include <onnxruntime_c_api.h>

#include <cstdint>

namespace lorafuse {
constexpr std::uint32_t kApiVersion = 18;  // the first that has all that is called
}

#else

#include <cstddef>
#include <cstdint>

extern "C" {

struct OrtEnv;
struct OrtStatus;
struct OrtMemoryInfo;
struct OrtSession;
struct OrtValue;
struct OrtRunOptions;
struct OrtTypeInfo;
struct OrtTensorTypeAndShapeInfo;
struct OrtSessionOptions;
struct OrtPrepackedWeightsContainer;
struct OrtAllocator;

enum OrtLoggingLevel : int { ORT_LOGGING_LEVEL_FATAL = 4 };
enum OrtAllocatorType : int { OrtArenaAllocator = 1 };
enum OrtMemType : int { OrtMemTypeDefault = 0 };
enum ONNXTensorElementDataType : int {};

struct OrtApi {
    void* unused_0[2];
    const char* (*GetErrorMessage)(const OrtStatus*) noexcept;
    OrtStatus* (*CreateEnv)(OrtLoggingLevel, const char*, OrtEnv**) noexcept;
    void* unused_4[5];
    OrtStatus* (*Run)(OrtSession*, const OrtRunOptions*, const char* const*, const OrtValue* const*, std::size_t,
                      const char* const*, std::size_t, OrtValue**) noexcept;
    OrtStatus* (*CreateSessionOptions)(OrtSessionOptions**) noexcept;
    void* unused_11[11];
    OrtStatus* (*SetSessionLogSeverityLevel)(OrtSessionOptions*, int) noexcept;
    void* unused_23[1];
    OrtStatus* (*SetIntraOpNumThreads)(OrtSessionOptions*, int) noexcept;
    void* unused_25[5];
    OrtStatus* (*SessionGetInputCount)(const OrtSession*, std::size_t*) noexcept;
    OrtStatus* (*SessionGetOutputCount)(const OrtSession*, std::size_t*) noexcept;
    void* unused_32[1];
    OrtStatus* (*SessionGetInputTypeInfo)(const OrtSession*, std::size_t, OrtTypeInfo**) noexcept;
    void* unused_34[2];
    OrtStatus* (*SessionGetInputName)(const OrtSession*, std::size_t, OrtAllocator*, char**) noexcept;
    OrtStatus* (*SessionGetOutputName)(const OrtSession*, std::size_t, OrtAllocator*, char**) noexcept;
    void* unused_38[11];
    OrtStatus* (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo*, void*, std::size_t, const std::int64_t*,
                                                 std::size_t, ONNXTensorElementDataType, OrtValue**) noexcept;
    void* unused_50[1];
    OrtStatus* (*GetTensorMutableData)(OrtValue*, void**) noexcept;
    void* unused_52[3];
    OrtStatus* (*CastTypeInfoToTensorInfo)(const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo**) noexcept;
    void* unused_56[4];
    OrtStatus* (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo*, ONNXTensorElementDataType*) noexcept;
    OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo*, std::size_t*) noexcept;
    OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo*, std::int64_t*, std::size_t) noexcept;
    void* unused_63[2];
    OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo**) noexcept;
    void* unused_66[3];
    OrtStatus* (*CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo**) noexcept;
    void* unused_70[6];
    OrtStatus* (*AllocatorFree)(OrtAllocator*, void*) noexcept;
    void* unused_77[1];
    OrtStatus* (*GetAllocatorWithDefaultOptions)(OrtAllocator**) noexcept;
    void* unused_79[13];
    void (*ReleaseEnv)(OrtEnv*) noexcept;
    void (*ReleaseStatus)(OrtStatus*) noexcept;
    void (*ReleaseMemoryInfo)(OrtMemoryInfo*) noexcept;
    void (*ReleaseSession)(OrtSession*) noexcept;
    void (*ReleaseValue)(OrtValue*) noexcept;
    void* unused_97[1];
    void (*ReleaseTypeInfo)(OrtTypeInfo*) noexcept;
    void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*) noexcept;
    void (*ReleaseSessionOptions)(OrtSessionOptions*) noexcept;
    void* unused_101[29];
    OrtStatus* (*AddSessionConfigEntry)(OrtSessionOptions*, const char*, const char*) noexcept;
    void* unused_131[19];
    OrtStatus* (*AddInitializer)(OrtSessionOptions*, const char*, const OrtValue*) noexcept;
    void* unused_151[15];
    OrtStatus* (*CreatePrepackedWeightsContainer)(OrtPrepackedWeightsContainer**) noexcept;
    void (*ReleasePrepackedWeightsContainer)(OrtPrepackedWeightsContainer*) noexcept;
    void* unused_168[1];
    OrtStatus* (*CreateSessionFromArrayWithPrepackedWeightsContainer)(const OrtEnv*, const void*, std::size_t,
                                                                      const OrtSessionOptions*,
                                                                      OrtPrepackedWeightsContainer*,
                                                                      OrtSession**) noexcept;
    void* unused_170[40];
    OrtStatus* (*AddExternalInitializers)(OrtSessionOptions*, const char* const*, const OrtValue* const*,
                                          std::size_t) noexcept;
    void* unused_211[68];
    OrtStatus* (*AddExternalInitializersFromFilesInMemory)(OrtSessionOptions*, const char* const*, char* const*,
                                                           const std::size_t*, std::size_t) noexcept;
};

struct OrtApiBase {
    const OrtApi* (*GetApi)(std::uint32_t version) noexcept;
    const char* (*GetVersionString)() noexcept;
};

}  // extern "C"

namespace lorafuse {

constexpr std::uint32_t kApiVersion = 18;  // the first that has all that is called

#define LORAFUSE_AT(entry, slot) static_assert(offsetof(OrtApi, entry) == (slot) * sizeof(void*))
LORAFUSE_AT(GetErrorMessage, 2);
LORAFUSE_AT(Run, 9);
LORAFUSE_AT(SetSessionLogSeverityLevel, 22);
LORAFUSE_AT(SetIntraOpNumThreads, 24);
LORAFUSE_AT(SessionGetInputCount, 30);
LORAFUSE_AT(SessionGetInputTypeInfo, 33);
LORAFUSE_AT(SessionGetInputName, 36);
LORAFUSE_AT(CreateTensorWithDataAsOrtValue, 49);
LORAFUSE_AT(GetTensorMutableData, 51);
LORAFUSE_AT(CastTypeInfoToTensorInfo, 55);
LORAFUSE_AT(GetTensorElementType, 60);
LORAFUSE_AT(GetTensorTypeAndShape, 65);
LORAFUSE_AT(CreateCpuMemoryInfo, 69);
LORAFUSE_AT(AllocatorFree, 76);
LORAFUSE_AT(GetAllocatorWithDefaultOptions, 78);
LORAFUSE_AT(ReleaseEnv, 92);
LORAFUSE_AT(ReleaseTypeInfo, 98);
LORAFUSE_AT(ReleaseSessionOptions, 100);
LORAFUSE_AT(AddSessionConfigEntry, 130);
LORAFUSE_AT(AddInitializer, 150);
LORAFUSE_AT(CreatePrepackedWeightsContainer, 166);
LORAFUSE_AT(CreateSessionFromArrayWithPrepackedWeightsContainer, 169);
LORAFUSE_AT(AddExternalInitializers, 210);
LORAFUSE_AT(AddExternalInitializersFromFilesInMemory, 279);
#undef LORAFUSE_AT

}  // namespace lorafuse

#endif
