#include "safetensors.hpp"

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <system_error>
#include <tuple>

#include "dtype.hpp"
#include "json_reader.hpp"
#include "printable.hpp"

namespace lorafuse {
namespace {

constexpr std::uint64_t kLongestHeader = 100'000'000;  // the format's own limit

// What the format has and engines don't.
constexpr std::array<std::string_view, 9> kOtherDTypes = {"F4",      "F6_E2M3",     "F6_E3M2",     "F8_E5M2", "F8_E4M3",
                                                          "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"};

// The reasons are the safetensors library's, which Python hands on.
[[noreturn]] void refuse(const std::filesystem::path& path, const std::string& reason) {
    throw Error(path.string() + ": not a whole safetensors file (Error while deserializing header: " + reason +
                "); fetch or save it again");
}

struct Entry {
    std::string name;
    DType dtype;
    std::vector<std::int64_t> shape;
    std::uint64_t start, end;
};

std::int64_t not_negative(const JsonReader& json) {
    const std::int64_t number = json.number();
    if (number < 0) throw JsonError("invalid value: integer `" + std::to_string(number) + "`");
    return number;
}

Entry entry_of(const std::filesystem::path& path, const std::string& name, const JsonReader& described) {
    for (const char* field : {"dtype", "shape", "data_offsets"}) described.check_has(field);
    const std::string code = described.at("dtype").text();
    const std::optional<DType> dtype = dtype_in_safetensors(code);
    if (!dtype && std::find(kOtherDTypes.begin(), kOtherDTypes.end(), code) == kOtherDTypes.end())
        throw JsonError("unknown variant `" + code + "`");
    if (!dtype)
        throw Error(path.string() + ": tensor '" + printable(name) + "' has dtype " + printable(code) +
                    "; expected one of F64, F32, F16, I64, I32, I16, I8, U64, U32, U16, U8, BOOL, BF16");
    std::vector<std::int64_t> shape, offsets;
    described.at("shape").each([&](const JsonReader& size) { shape.push_back(not_negative(size)); });
    described.at("data_offsets").each([&](const JsonReader& offset) { offsets.push_back(not_negative(offset)); });
    if (offsets.size() != 2) throw JsonError("expected 2 offsets of " + in_quotes(name));
    return {name, *dtype, std::move(shape), static_cast<std::uint64_t>(offsets[0]),
            static_cast<std::uint64_t>(offsets[1])};
}

// The header's text, and where the data starts.
std::string_view header_of(const std::filesystem::path& path, const MappedFile& file, std::uint64_t& data_start) {
    if (file.size() < 8) refuse(path, "header too small");
    std::uint64_t length = 0;
    for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<std::uint64_t>(file.data()[i]);
    if (length > kLongestHeader) refuse(path, "header too large");
    if (length > file.size() - 8) refuse(path, "invalid header length");
    data_start = 8 + length;
    return {reinterpret_cast<const char*>(file.data() + 8), static_cast<std::size_t>(length)};
}

// Every byte of data belongs to exactly one tensor: no gaps, no overlaps, nothing behind.
void check_coverage(const std::filesystem::path& path, std::vector<Entry>& entries, std::uint64_t size) {
    std::sort(entries.begin(), entries.end(), [](const Entry& one, const Entry& two) {
        return std::tie(one.start, one.end) < std::tie(two.start, two.end);
    });
    std::uint64_t at = 0;
    for (const Entry& entry : entries) {
        if (entry.start != at || entry.end < at)
            refuse(path, "invalid offset for tensor `" + printable(entry.name) + "`");
        const auto bytes = bytes_of(entry.shape, entry.dtype);
        if (!bytes) refuse(path, "overflow computing buffer size from shape and/or element type");
        if (bytes != entry.end - entry.start) refuse(path, "invalid shape, data type, or offset for tensor");
        at = entry.end;
    }
    if (at != size) refuse(path, "incomplete metadata, file not fully covered");
}

}  // namespace

TensorFile::TensorFile(const std::filesystem::path& path) try : file_(path) {
    std::uint64_t data_start = 0;
    const JsonDocument header(header_of(path, file_, data_start));
    std::vector<Entry> entries;
    header.root().each([&](const std::string& name, const JsonReader& described) {
        if (name != "__metadata__") entries.push_back(entry_of(path, name, described));
        else if (!described.is_null()) described.each([](const std::string&, const JsonReader& text) { text.text(); });
    });
    check_coverage(path, entries, file_.size() - data_start);
    for (Entry& entry : entries) {
        const std::byte* data = file_.data() + data_start + entry.start;
        tensors_[entry.name] = {entry.dtype, std::move(entry.shape), data,
                                static_cast<std::size_t>(entry.end - entry.start)};
    }
} catch (const JsonError& error) {
    refuse(path, "invalid JSON in header: " + printable(error.what()));
} catch (const std::system_error& error) {
    throw Error(path.string() + ": can't be read (" + error.code().message() + "); export the task again");
}

}  // namespace lorafuse
