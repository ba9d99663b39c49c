#include <cstdio>
#include <lorafuse.h>
#include <lorafuse/runtime.hpp>

int main(int, char** values) {
    lorafuse::Runtime runtime(values[1]);
    for (const std::string& task : runtime.tasks()) std::printf("%s\n", task.c_str());
    lorafuse_runtime* opened = nullptr;
    return lorafuse_open("nowhere", nullptr, &opened) == LORAFUSE_REFUSED && opened == nullptr ? 0 : 1;
}
