#include "safetensors.hpp"

#include <algorithm>
#include <optional>
#include <system_error>
#include <tuple>

#include "dtype.hpp"
#include "json_reader.hpp"
#include "printable.hpp"

namespace lorafuse {
namespace {

constexpr std::uint64_t kLongestHeader = 100'000'000;  // the format's own limit

[[noreturn]] void refuse(const std::filesystem::path& path, const std::string& reason) {
    throw Error(path.string() + ": not a whole safetensors file (" + reason + "); fetch or save it again");
}

// The bytes that a shape takes, or nothing where they can't be counted.
std::optional<std::uint64_t> bytes_of(const std::vector<std::int64_t>& shape, DType dtype) {
    std::uint64_t bytes = size_of(dtype);
    for (const std::int64_t size : shape) {
        if (size < 0 || __builtin_mul_overflow(bytes, static_cast<std::uint64_t>(size), &bytes)) return std::nullopt;
    }
    return bytes;
}

struct Entry {
    std::string name;
    DType dtype;
    std::vector<std::int64_t> shape;
    std::uint64_t start, end;
};

Entry entry_of(const std::filesystem::path& path, const std::string& name, const JsonReader& described) {
    described.check_fields({"dtype", "shape", "data_offsets"});
    const std::string code = described.at("dtype").text();
    const std::optional<DType> dtype = dtype_in_safetensors(code);
    if (!dtype)
        throw Error(path.string() + ": tensor " + in_quotes(name) + " has dtype " + printable(code) + "; engines take none such");
    std::vector<std::int64_t> shape, offsets;
    described.at("shape").each([&](const JsonReader& size) { shape.push_back(size.number()); });
    described.at("data_offsets").each([&](const JsonReader& offset) { offsets.push_back(offset.number()); });
    if (offsets.size() != 2 || offsets[0] < 0 || offsets[1] < offsets[0])
        refuse(path, "tensor " + in_quotes(name) + " has offsets that are none");
    return {name, *dtype, std::move(shape), static_cast<std::uint64_t>(offsets[0]), static_cast<std::uint64_t>(offsets[1])};
}

// The header's text, and where the data starts.
std::string_view header_of(const std::filesystem::path& path, const MappedFile& file, std::uint64_t& data_start) {
    if (file.size() < 8) refuse(path, "no room for a header");
    std::uint64_t length = 0;
    for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<std::uint64_t>(file.data()[i]);
    if (length > kLongestHeader || length > file.size() - 8) refuse(path, "its header is longer than the file");
    data_start = 8 + length;
    return {reinterpret_cast<const char*>(file.data() + 8), static_cast<std::size_t>(length)};
}

// Every byte of data belongs to exactly one tensor: no gaps, no overlaps, nothing behind.
void check_coverage(const std::filesystem::path& path, std::vector<Entry>& entries, std::uint64_t size) {
    std::sort(entries.begin(), entries.end(),
              [](const Entry& one, const Entry& two) { return std::tie(one.start, one.end) < std::tie(two.start, two.end); });
    std::uint64_t at = 0;
    for (const Entry& entry : entries) {
        const auto bytes = bytes_of(entry.shape, entry.dtype);
        if (entry.start != at || bytes != entry.end - entry.start) {
            refuse(path, "tensor " + in_quotes(entry.name) + " does not lie where its shape says");
        }
        at = entry.end;
    }
    if (at != size) refuse(path, "its tensors do not fill the file");
}

}  // namespace

TensorFile::TensorFile(const std::filesystem::path& path) try : file_(path) {
    std::uint64_t data_start = 0;
    const JsonDocument header(header_of(path, file_, data_start));
    std::vector<Entry> entries;
    header.root().each([&](const std::string& name, const JsonReader& described) {
        if (name != "__metadata__") entries.push_back(entry_of(path, name, described));
    });
    check_coverage(path, entries, file_.size() - data_start);
    for (Entry& entry : entries) {
        const std::byte* data = file_.data() + data_start + entry.start;
        tensors_[entry.name] = {entry.dtype, std::move(entry.shape), data, static_cast<std::size_t>(entry.end - entry.start)};
    }
} catch (const JsonError& error) {
    refuse(path, printable(error.what()));
} catch (const std::system_error& error) {
    throw Error(path.string() + ": can't be read (" + error.code().message() + "); export the task again");
}

}  // namespace lorafuse
