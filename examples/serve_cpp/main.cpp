// Serves a batch from a package that `sparsekit export --to aoti` wrote, without Python:
//
//     serve sparsekit/_C.abi3.so ticket.pt2 8x1x28x28 [repeats] < images.f32 > logits.f32
//
// Reads float32 numbers of that shape from stdin and writes the model's output to stdout; with repeats, runs the
// batch so many times more and prints the median time. A package holds machine code: run only those you trust.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <dlfcn.h>
#include <malloc.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

static std::vector<int64_t> parse_shape(const std::string& text) {
    std::vector<int64_t> shape;
    for (size_t at = 0; at <= text.size();) {
        const size_t end = std::min(text.find('x', at), text.size());
        shape.push_back(std::stoll(text.substr(at, end - at)));
        at = end + 1;
    }
    return shape;
}

static void serve(int argc, char** argv) {
    if (argc < 4) throw std::runtime_error("Expected LIBRARY PACKAGE SHAPE [REPEATS], got fewer");
    // Or glibc gives a batch's memory back and has it paged in anew for the next, for up to a tenth of the time.
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 0);  // compiled code trusts its inputs unless asked
    // The operators of the sparse layers register themselves with torch when their library is opened.
    if (!dlopen(argv[1], RTLD_NOW)) throw std::runtime_error(dlerror());
    if (const char* threads = std::getenv("OMP_NUM_THREADS")) at::set_num_threads(std::stoi(threads));

    const at::Tensor x = at::empty(parse_shape(argv[3]), at::kFloat);
    const size_t wanted = static_cast<size_t>(x.numel());
    if (std::fread(x.data_ptr<float>(), sizeof(float), wanted, stdin) != wanted)
        throw std::runtime_error("Expected " + std::to_string(wanted) + " numbers on stdin, got fewer");

    torch::inductor::AOTIModelPackageLoader model(argv[2]);
    const at::Tensor y = model.run({x}).at(0).contiguous();
    std::fwrite(y.data_ptr<float>(), sizeof(float), static_cast<size_t>(y.numel()), stdout);

    std::vector<double> times;
    for (int left = argc > 4 ? std::stoi(argv[4]) : 0; left > 0; --left) {
        const auto start = std::chrono::steady_clock::now();
        model.run({x});
        times.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
    }
    std::sort(times.begin(), times.end());
    if (!times.empty()) std::fprintf(stderr, "%.1f us\n", times[times.size() / 2]);
}

int main(int argc, char** argv) {
    try {
        serve(argc, argv);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "serve: %s\n", error.what());
        return 1;
    }
}
