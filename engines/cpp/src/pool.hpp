// Things that are loaded when they are first used, shared by threads, and given up in the order of their last use when
// memory is short. See engines/serving/pool.py.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <iterator>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "lorafuse/runtime.hpp"

namespace lorafuse {

// At most `budget` bytes of things by key (0: no bound). What is in use is never given up: who needs the room waits for
// it. A thread never waits for itself: what only its own end could bring about is an error at once.
template <typename Key, typename Value>
class Pool {
public:
    using Load = std::function<std::shared_ptr<const Value>(const Key&)>;
    using Cost = std::function<std::uint64_t(const Key&)>;

    Pool(Load load, Cost cost, std::uint64_t budget)
        : load_(std::move(load)), cost_(std::move(cost)), budget_(budget) {}

    // The thing of `key`, in use by this thread for as long as a copy of the pointer lives. Throws what loading it
    // throws; the next use loads anew.
    std::shared_ptr<const Value> use(const Key& key) {
        std::unique_lock lock(mutex_);
        auto entry = find(key);
        for (std::uint64_t cost = 0; entry == entries_.end() && !make_room(cost = cost_(key)); entry = find(key))
            wait_for_room(lock, cost);
        const Thread me = std::this_thread::get_id();
        if (entry == entries_.end())
            return loaded(lock, entries_.insert(entries_.end(), Entry{key, cost_(key), {{me, 1}}}));
        entries_.splice(entries_.end(), entries_, entry);
        ++entry->users[me];
        changed_.wait(lock, [&] { return entry->ready; });
        return in_use(entry);
    }

    // Give up what is unwanted: now, or when the last use of it ends.
    void evict(const std::function<bool(const Key&)>& unwanted) {
        const std::lock_guard lock(mutex_);
        for (auto entry = entries_.begin(); entry != entries_.end();) {
            const auto next = std::next(entry);
            if (unwanted(entry->key)) {
                entry->leaving = true;
                if (entry->users.empty()) entries_.erase(entry);
            }
            entry = next;
        }
        changed_.notify_all();
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
    using Thread = std::thread::id;
    struct Entry {
        Key key;
        std::uint64_t cost;
        std::map<Thread, int> users{};  // those who have it in hand, or wait for it, and how often
        bool ready = false;
        bool leaving = false;  // given up when the last of them is done
        std::shared_ptr<const Value> value{};
        std::exception_ptr error{};
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
        const Thread me = std::this_thread::get_id();
        if (entry->error) {
            const std::exception_ptr error = entry->error;
            put_down(entry, me);
            std::rethrow_exception(error);
        }
        const Value* value = entry->value.get();
        return std::shared_ptr<const Value>(value, [this, entry, me](const Value*) {
            const std::lock_guard lock(mutex_);
            put_down(entry, me);
        });
    }

    void put_down(Place entry, Thread user) {
        if (--entry->users[user] == 0) entry->users.erase(user);
        if (entry->users.empty() && (entry->error || entry->leaving)) entries_.erase(entry);
        changed_.notify_all();
    }

    // Throws Error where no other thread can make room: this one has too much, or all wait for each other.
    void wait_for_room(std::unique_lock<std::mutex>& lock, std::uint64_t cost) {
        const Thread me = std::this_thread::get_id();
        std::uint64_t mine = 0;
        bool others = false;  // who may yet put down what they have
        for (const Entry& entry : entries_) {
            if (entry.users.count(me) != 0) mine += entry.cost;
            for (const auto& [user, _] : entry.users) others |= user != me && waiting_.count(user) == 0;
        }
        if (mine + cost > budget_ || !others) {
            throw Error(std::to_string(cost) + " bytes of weights are needed beside " + std::to_string(mine) +
                        " that this thread has in use, and the memory budget is " + std::to_string(budget_) +
                        "; raise it, or end that use first");
        }
        ++waiting_[me];
        changed_.wait(lock);
        if (--waiting_[me] == 0) waiting_.erase(me);
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
                std::find_if(entries_.begin(), entries_.end(), [](const Entry& entry) { return entry.users.empty(); });
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
    std::map<Thread, int> waiting_;  // for room
};

}  // namespace lorafuse
