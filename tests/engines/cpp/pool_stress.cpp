// The pool under ThreadSanitizer: nothing is loaded twice at once, nothing in use is given up, the budget holds, and an
// error reaches those who waited and nobody after them; what is evicted goes, and two at once never wait for ever.
#include <array>
#include <atomic>
#include <cstdio>
#include <random>
#include <thread>

#include "pool.hpp"

namespace {

constexpr int kKeys = 6, kThreads = 8, kTurns = 4000;
constexpr std::uint64_t kBudget = 3;

struct Counts {
    std::array<std::atomic<int>, kKeys> alive{};
    std::atomic<int> all{0}, loads{0}, refused{0},
        broken{0};  // `all` that are alive: a sum over keys is no moment's number
};

struct Thing {
    Counts& counts;
    int key;
    Thing(Counts& all, int of) : counts(all), key(of) {
        if (++counts.alive[static_cast<std::size_t>(key)] != 1 || ++counts.all > static_cast<int>(kBudget))
            ++counts.broken;
    }
    ~Thing() { --counts.alive[static_cast<std::size_t>(key)], --counts.all; }
    Thing(const Thing&) = delete;
    Thing& operator=(const Thing&) = delete;
};

}  // namespace

int main() {
    Counts counts;
    std::atomic<int> turn{0};
    const auto load = [&](const int& key) {
        if (key == 0 && ++turn % 2 == 0) throw lorafuse::Error("damaged");
        ++counts.loads;
        return std::make_shared<const Thing>(counts, key);
    };
    lorafuse::Pool<int, Thing> pool(load, [](const int&) { return std::uint64_t{1}; }, kBudget);
    const auto work = [&](unsigned seed) {
        std::mt19937 chance(seed);
        for (int i = 0; i < kTurns; ++i) {
            const int key = static_cast<int>(chance() % kKeys);
            try {
                const auto thing = pool.use(key);
                if (i % 16 == 0) pool.evict([&](const int& held) { return held == key; });
                if (i % 32 == 0) pool.use((key + 1) % kKeys);
                if (thing->key != key || counts.alive[static_cast<std::size_t>(key)] != 1) ++counts.broken;
            } catch (const lorafuse::Error&) {
                ++counts.refused;
            }
        }
    };
    std::vector<std::thread> threads;
    for (unsigned seed = 0; seed < kThreads; ++seed) threads.emplace_back(work, seed);
    for (std::thread& thread : threads) thread.join();
    if (pool.held().size() > kBudget) ++counts.broken;
    std::printf("%d broken, loaded again: %s, refused: %s\n", counts.broken.load(), counts.loads > kKeys ? "yes" : "no",
                counts.refused > 0 ? "yes" : "no");
    return counts.broken == 0 ? 0 : 1;
}
