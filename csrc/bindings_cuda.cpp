// mixbits._cuda: the functions of cuda/ops.cuh under their own names. Pointers and the stream
// are integers, as torch's data_ptr() and cuda_stream give them; 0 is null.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "cuda/ops.cuh"

namespace py = pybind11;
namespace cuda = mixbits::cuda;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("CUDA: ") + error);
}

using Segments = std::vector<cuda::SegmentArgs>;

cuda::MatmulArgs matmul_args(uintptr_t x, const Segments& segments, uintptr_t out, int64_t tokens,
                             int64_t rows, int64_t columns, int dtype) {
  return {pointer<void>(x),
          segments.data(),
          int(segments.size()),
          pointer<void>(out),
          tokens,
          rows,
          columns,
          dtype};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of mixbits: device pointers, sizes and a stream; no allocation, no sync.";
  m.attr("MAX_TOKENS") = cuda::kMaxTokens;
  m.attr("MAX_FORMATS") = cuda::kMaxFormats;
  m.attr("MAX_SEGMENTS") = cuda::kMaxSegments;
  m.attr("MIXED_TOKENS") = cuda::kMixedTokens;
  m.attr("E4M3_TOKENS") = cuda::kE4M3Tokens;
#ifdef MB_WGMMA
  m.attr("HAS_WGMMA") = true;
#else
  m.attr("HAS_WGMMA") = false;
#endif

  py::class_<cuda::SegmentArgs>(m, "Segment", "A packed weight: its tensors' addresses by name.")
      .def(py::init([](uintptr_t weight_packed, uintptr_t weight_scale, uintptr_t weight_zero_point,
                       uintptr_t weight_global_scale, int64_t columns, int format, int activation) {
             const cuda::PackedArgs packed{
                 pointer<uint8_t>(weight_packed), pointer<void>(weight_scale),
                 pointer<uint8_t>(weight_zero_point), pointer<float>(weight_global_scale)};
             return cuda::SegmentArgs{packed, columns, format, activation};
           }),
           py::kw_only(), py::arg("weight_packed"), py::arg("weight_scale"),
           py::arg("weight_zero_point"), py::arg("weight_global_scale"), py::arg("columns"),
           py::arg("format"), py::arg("activation") = 0);

  m.def(
      "why_unusable",
      []() -> py::object {
        const char* reason = cuda::why_unusable();
        return reason == nullptr ? py::none() : py::object(py::str(reason));
      },
      "None when the current device exists and this build has code for it, else the reason.");

  m.def(
      "fake_quantize",
      [](uintptr_t x, uintptr_t out, int64_t rows, int64_t columns, int dtype, int format,
         uintptr_t stream) {
        check(cuda::fake_quantize(pointer<void>(x), pointer<void>(out), rows, columns, dtype,
                                  format, pointer<void>(stream)));
      },
      py::arg("x"), py::arg("out"), py::arg("rows"), py::arg("columns"), py::arg("dtype"),
      py::arg("format"), py::arg("stream"), "x, out: [rows, columns] of dtype.");

  m.def(
      "quantize_pack",
      [](uintptr_t weight, uintptr_t codes, uintptr_t scales, uintptr_t zero_points, int64_t rows,
         int64_t columns, int dtype, int format, uintptr_t stream) {
        check(cuda::quantize_pack(pointer<void>(weight), pointer<uint8_t>(codes),
                                  pointer<void>(scales), pointer<uint8_t>(zero_points), rows,
                                  columns, dtype, format, pointer<void>(stream)));
      },
      py::arg("weight"), py::arg("codes"), py::arg("scales"), py::arg("zero_points"),
      py::arg("rows"), py::arg("columns"), py::arg("dtype"), py::arg("format"), py::arg("stream"),
      "weight: [rows, columns] of dtype; the outputs have the shapes of mixbits.formats.pack.");

  m.def(
      "dequantize",
      [](const cuda::SegmentArgs& weight, uintptr_t out, int64_t rows, int64_t stride, int dtype,
         uintptr_t stream) {
        check(cuda::dequantize(weight, pointer<void>(out), rows, stride, dtype,
                               pointer<void>(stream)));
      },
      py::arg("weight"), py::arg("out"), py::arg("rows"), py::arg("stride"), py::arg("dtype"),
      py::arg("stream"),
      "out: [rows, columns of the weight] of dtype, rows `stride` values apart.");

  m.def("statistics_row_blocks", &cuda::statistics_row_blocks, py::arg("rows"), py::arg("columns"),
        "First dimension of the workspace of `statistics`.");

  m.def(
      "statistics",
      [](uintptr_t weight, uintptr_t row_weight, uintptr_t column_weight, uintptr_t gradient,
         const std::vector<int>& formats, uintptr_t workspace, uintptr_t out, int64_t rows,
         int64_t columns, int dtype, int gradient_dtype, uintptr_t stream) {
        const cuda::StatisticsArgs args{pointer<void>(weight),
                                        pointer<double>(row_weight),
                                        pointer<double>(column_weight),
                                        pointer<void>(gradient),
                                        formats.data(),
                                        pointer<double>(workspace),
                                        pointer<double>(out),
                                        rows,
                                        columns,
                                        dtype,
                                        gradient_dtype,
                                        int(formats.size())};
        check(cuda::statistics(args, pointer<void>(stream)));
      },
      py::arg("weight"), py::arg("row_weight"), py::arg("column_weight"), py::arg("gradient"),
      py::arg("formats"), py::arg("workspace"), py::arg("out"), py::arg("rows"), py::arg("columns"),
      py::arg("dtype"), py::arg("gradient_dtype"), py::arg("stream"),
      "Fisher form with row_weight and column_weight (float64), else gradient; at most MAX_FORMATS "
      "formats. workspace: float64 [statistics_row_blocks, formats, slabs].");

  m.def(
      "packed_matmul",
      [](uintptr_t x, const Segments& segments, uintptr_t out, int64_t tokens, int64_t rows,
         int64_t columns, int dtype, uintptr_t sums, uintptr_t stream) {
        const auto args = matmul_args(x, segments, out, tokens, rows, columns, dtype);
        check(cuda::packed_matmul(args, pointer<float>(sums), pointer<void>(stream)));
      },
      py::arg("x"), py::arg("segments"), py::arg("out"), py::arg("tokens"), py::arg("rows"),
      py::arg("columns"), py::arg("dtype"), py::arg("sums"), py::arg("stream"),
      "x [tokens, columns] -> out [tokens, rows]; at most MAX_TOKENS tokens. Of several "
      "segments, x is that of one after the other, and sums is float32 [tokens, rows]; else 0.");

  m.def(
      "packed_matmul_mma",
      [](uintptr_t x, const Segments& segments, uintptr_t out, int64_t tokens, int64_t rows,
         int64_t columns, int dtype, int row_tiles, int token_tiles, int warps, uintptr_t stream) {
        const auto args = matmul_args(x, segments, out, tokens, rows, columns, dtype);
        check(cuda::packed_matmul_mma(args, row_tiles, token_tiles, warps, pointer<void>(stream)));
      },
      py::arg("x"), py::arg("segments"), py::arg("out"), py::arg("tokens"), py::arg("rows"),
      py::arg("columns"), py::arg("dtype"), py::arg("row_tiles"), py::arg("token_tiles"),
      py::arg("warps"), py::arg("stream"),
      "As packed_matmul, for 16-bit x, segments side by side, on the matrix units of sm_80 and "
      "later.");

  m.def("prepared_bytes", &cuda::prepared_bytes, py::arg("tokens"), py::arg("columns"),
        py::arg("block_tokens"), "Bytes that prepare_activations writes.");

  m.def(
      "prepare_activations",
      [](uintptr_t x, uintptr_t out, uintptr_t order, int order_bytes, bool rotated,
         const Segments& segments, int64_t tokens, int64_t columns, int dtype, int out_dtype,
         int block_tokens, uintptr_t stream) {
        const cuda::PrepareArgs args{pointer<void>(x),
                                     pointer<void>(out),
                                     pointer<void>(order),
                                     order_bytes,
                                     rotated,
                                     segments.data(),
                                     int(segments.size()),
                                     tokens,
                                     columns,
                                     dtype,
                                     out_dtype,
                                     block_tokens};
        check(cuda::prepare_activations(args, pointer<void>(stream)));
      },
      py::arg("x"), py::arg("out"), py::arg("order"), py::arg("order_bytes"), py::arg("rotated"),
      py::arg("segments"), py::arg("tokens"), py::arg("columns"), py::arg("dtype"),
      py::arg("out_dtype"), py::arg("block_tokens"), py::arg("stream"),
      "x [tokens, columns], ordered, rotated, and fake-quantized to the activation of each segment "
      "unless 0 -> rows of out_dtype, or with block_tokens what the wgmma products read.");

  m.def(
      "packed_matmul_wgmma",
      [](uintptr_t prepared, const Segments& segments, uintptr_t out, int64_t tokens, int64_t rows,
         int64_t columns, int dtype, int block_tokens, int parts, uintptr_t stream) {
#ifdef MB_WGMMA
        const auto args = matmul_args(prepared, segments, out, tokens, rows, columns, dtype);
        check(cuda::packed_matmul_wgmma(args, block_tokens, parts, pointer<void>(stream)));
#else
        check("built without sm_90a");
#endif
      },
      py::arg("prepared"), py::arg("segments"), py::arg("out"), py::arg("tokens"), py::arg("rows"),
      py::arg("columns"), py::arg("dtype"), py::arg("block_tokens"), py::arg("parts"),
      py::arg("stream"),
      "As packed_matmul_mma, from prepared activations, on the warpgroup matrix units of sm_90a.");

  m.def(
      "prepare_e4m3",
      [](uintptr_t x, uintptr_t out, uintptr_t scales, int64_t tokens, int64_t columns, int dtype,
         uintptr_t stream) {
#ifdef MB_WGMMA
        check(cuda::prepare_e4m3(pointer<void>(x), pointer<uint8_t>(out), pointer<float>(scales),
                                 tokens, columns, dtype, pointer<void>(stream)));
#else
        check("built without sm_90a");
#endif
      },
      py::arg("x"), py::arg("out"), py::arg("scales"), py::arg("tokens"), py::arg("columns"),
      py::arg("dtype"), py::arg("stream"),
      "x [tokens, columns] -> uint8 [T, columns rounded up to 128] and float32 [T], T being tokens "
      "rounded up to E4M3_TOKENS.");

  m.def(
      "packed_matmul_e4m3",
      [](uintptr_t prepared, const cuda::SegmentArgs& weight, uintptr_t row_scales,
         uintptr_t token_scales, uintptr_t out, int64_t tokens, int64_t rows, int dtype,
         uintptr_t stream) {
#ifdef MB_WGMMA
        const Segments weights{weight};
        const auto args = matmul_args(prepared, weights, out, tokens, rows, weight.columns, dtype);
        check(cuda::packed_matmul_e4m3(args, pointer<uint8_t>(row_scales),
                                       pointer<float>(token_scales), pointer<void>(stream)));
#else
        check("built without sm_90a");
#endif
      },
      py::arg("prepared"), py::arg("weight"), py::arg("row_scales"), py::arg("token_scales"),
      py::arg("out"), py::arg("tokens"), py::arg("rows"), py::arg("dtype"), py::arg("stream"),
      "As packed_matmul_wgmma, of e2m1 weights folded to e4m3, from prepare_e4m3.");
}
