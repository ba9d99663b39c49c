// Things that are loaded when they are first used, shared by threads, and given up in the order of their last use when
// memory is short. See engines/serving/pool.py.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "lorafuse/runtime.hpp"

namespace lorafuse {

// At most `budget` bytes of things by key (0: no bound). What is in use is never given up: who needs the room waits for
// it.
template <typename Key, typename Value>
class Pool {
public:
    using Load = std::function<std::shared_ptr<const Value>(const Key&)>;
    using Cost = std::function<std::uint64_t(const Key&)>;

    Pool(Load load, Cost cost, std::uint64_t budget)
        : load_(std::move(load)), cost_(std::move(cost)), budget_(budget) {}

    // The thing of `key`, in use for as long as a copy of the pointer lives. Throws what loading it throws; the next
    // use loads anew.
    std::shared_ptr<const Value> use(const Key& key) {
        std::unique_lock lock(mutex_);
        auto entry = find(key);
        while (entry == entries_.end() && !make_room(cost_(key))) {
            changed_.wait(lock);
            entry = find(key);
        }
        if (entry == entries_.end())
            return loaded(lock, entries_.insert(entries_.end(), Entry{key, cost_(key), 1, false, nullptr, nullptr}));
        entries_.splice(entries_.end(), entries_, entry);
        ++entry->users;
        changed_.wait(lock, [&] { return entry->ready; });
        return in_use(entry);
    }

    // What is loaded, the longest unused first.
    std::vector<Key> held() const {
        const std::lock_guard lock(mutex_);
        std::vector<Key> keys;
        for (const Entry& entry : entries_) {
            if (entry.value) keys.push_back(entry.key);
        }
        return keys;
    }

private:
    struct Entry {
        Key key;
        std::uint64_t cost;
        int users;  // those who have it in hand, or wait for it
        bool ready;
        std::shared_ptr<const Value> value;
        std::exception_ptr error;
    };
    using Entries = std::list<Entry>;  // last used last
    using Place = typename Entries::iterator;

    // A failed entry is only there for those who still wait for it.
    Place find(const Key& key) {
        return std::find_if(entries_.begin(), entries_.end(),
                            [&](const Entry& entry) { return entry.key == key && !entry.error; });
    }

    std::shared_ptr<const Value> loaded(std::unique_lock<std::mutex>& lock, Place entry) {
        lock.unlock();
        std::shared_ptr<const Value> value;
        std::exception_ptr error;
        try {
            value = load_(entry->key);
        } catch (...) {
            error = std::current_exception();
        }
        lock.lock();
        entry->value = std::move(value), entry->error = error, entry->ready = true;
        changed_.notify_all();
        return in_use(entry);
    }

    // With the lock held, and the caller counted among the users.
    std::shared_ptr<const Value> in_use(Place entry) {
        if (entry->error) {
            const std::exception_ptr error = entry->error;
            put_down(entry);
            std::rethrow_exception(error);
        }
        const Value* value = entry->value.get();
        return std::shared_ptr<const Value>(value, [this, entry](const Value*) {
            const std::lock_guard lock(mutex_);
            put_down(entry);
        });
    }

    void put_down(Place entry) {
        if (--entry->users == 0 && entry->error) entries_.erase(entry);
        changed_.notify_all();
    }

    // Whether `cost` more bytes fit, after what is not in use was given up as far as needed.
    bool make_room(std::uint64_t cost) {
        if (budget_ == 0) return true;
        if (cost > budget_) {
            throw Error(std::to_string(cost) + " bytes of weights are needed at once, and the memory budget is " +
                        std::to_string(budget_) + "; raise it");
        }
        while (used() > budget_ - cost) {
            const auto idle =
                std::find_if(entries_.begin(), entries_.end(), [](const Entry& entry) { return entry.users == 0; });
            if (idle == entries_.end()) return false;
            entries_.erase(idle);
        }
        return true;
    }

    std::uint64_t used() const {
        std::uint64_t bytes = 0;
        for (const Entry& entry : entries_) bytes += entry.error ? 0 : entry.cost;
        return bytes;
    }

    Load load_;
    Cost cost_;
    std::uint64_t budget_;
    mutable std::mutex mutex_;
    std::condition_variable changed_;
    Entries entries_;
};

}  // namespace lorafuse
