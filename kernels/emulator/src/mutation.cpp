// The one mutant of this process.
#include "mutation.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace emulator {

namespace {

std::string name_of(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

struct Mutant {
    std::string kernel, file;
    int line = 0; // none
    Mutation change = Mutation::none;
};

Mutant environment() {
    const char* value = getenv("ANABRANCH_EMU_MUTANT");
    if (!value || !*value) return {};
    char kernel[256], file[256], change[16] = "";
    int line = 0;
    const int fields = sscanf(value, "%255[^:]:%255[^:]:%d:%15s", kernel, file, &line, change);
    if (fields == 3) return {kernel, file, line, Mutation::left_out};
    if (fields == 4 && !strcmp(change, "short")) return {kernel, file, line, Mutation::one_short};
    if (fields == 4 && !strcmp(change, "warp")) return {kernel, file, line, Mutation::warp_alone};
    fprintf(stderr, "emulator: ANABRANCH_EMU_MUTANT is \"%s\", expected KERNEL:FILE:LINE, and :short or :warp\n", value);
    exit(2);
}

const Mutant& mutant() {
    static const Mutant of_this_process = environment();
    return of_this_process;
}

thread_local bool concerned = false; // whether the running launch is of the mutant's kernel file

} // namespace

void start_mutation(const char* file) { concerned = mutant().line && mutant().kernel + ".cu" == name_of(file); }

Mutation mutation(Site site) {
    if (!concerned) return Mutation::none;
    const Mutant& m = mutant();
    return m.line == site.line && m.file == name_of(site.file) ? m.change : Mutation::none;
}

} // namespace emulator
