// SPDX-License-Identifier: Apache-2.0
//
// Two devices `pseudo:0` and `pseudo:1` in host memory. A tensor of theirs has storage from an allocator of its own, so that the
// CPU's kernels never see it by accident. Every operation goes through `run`: it refuses what CUDA refuses, reports what would
// make the host wait, and then calls the CPU's kernel on tensors that alias the same memory.

// Not torch/extension.h, of whose headers most are of no use here and take a third of the time of the compiler.
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

constexpr c10::DeviceType KIND = c10::DeviceType::PrivateUse1;
constexpr int DEVICES = 2;
thread_local int current = 0;

c10::Device device_of(int index) { return {KIND, static_cast<c10::DeviceIndex>(index)}; }

int index_of(const std::optional<c10::Device>& device) {
  int index = device && device->has_index() ? device->index() : current;
  TORCH_CHECK(index >= 0 && index < DEVICES, "pseudo error: invalid device ordinal ", index);
  return index;
}

struct On {  // makes a device the current one
  explicit On(int index) : before(current) { current = index; }
  ~On() { current = before; }
  int before;
};

// What happens is reported to Python, which counts it by the line that caused it.
PyObject* listener = nullptr;

void report(const char* what) {
  if (listener != nullptr) {
    py::gil_scoped_acquire gil;
    py::reinterpret_borrow<py::object>(listener)(what);
  }
}

// Memory ---------------------------------------------------------------------------------------------------------------

struct Account {
  std::atomic<int64_t> held{0}, peak{0}, limit{-1};
};
std::array<Account, DEVICES> accounts;

struct Block {
  int64_t size;
  int index;
};
constexpr size_t HEADER = 64;

void release(void* base) {
  auto* block = static_cast<Block*>(base);
  accounts[block->index].held -= block->size;
  std::free(base);
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    int index = current;
    if (size == 0) return {nullptr, nullptr, &c10::detail::deleteNothing, device_of(index)};
    auto& account = accounts[index];
    int64_t limit = account.limit, held = account.held.fetch_add(size) + static_cast<int64_t>(size);
    if (limit >= 0 && held > limit) {
      account.held -= size;
      C10_THROW_ERROR(OutOfMemoryError,
          c10::str("pseudo out of memory: tried to allocate ", size, " bytes on device ", index, ", of ", limit, " bytes"));
    }
    auto* base = static_cast<char*>(std::malloc(size + HEADER));
    if (base == nullptr) {
      account.held -= size;
      C10_THROW_ERROR(OutOfMemoryError, c10::str("pseudo out of memory: tried to allocate ", size, " bytes on device ", index));
    }
    int64_t peak = account.peak;
    while (held > peak && !account.peak.compare_exchange_weak(peak, held)) {}
    *reinterpret_cast<Block*>(base) = {static_cast<int64_t>(size), index};
    return {base + HEADER, base, &release, device_of(index)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t size) const final { default_copy_data(to, from, size); }
};
DeviceMemory device_memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &device_memory);

std::mutex pinned_lock;
std::set<const void*> pinned;

void unpin(void* base) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  pinned.erase(base);
  std::free(base);
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* base = std::malloc(std::max<size_t>(size, 1));
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned.insert(base);
    return {base, base, &unpin, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, std::size_t size) const final { default_copy_data(to, from, size); }
};
PinnedMemory pinned_memory;

bool is_pinned(const at::Tensor& tensor) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  return tensor.has_storage() && pinned.count(tensor.storage().data()) > 0;
}

// Generators -----------------------------------------------------------------------------------------------------------

// As on any accelerator a seed gives other numbers than on the CPU.
struct DeviceGenerator final : c10::GeneratorImpl {
  explicit DeviceGenerator(int index)
      : c10::GeneratorImpl(device_of(index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        numbers(at::make_generator<at::CPUGeneratorImpl>(0)) {
    set_current_seed(c10::default_rng_seed_val);
  }
  void set_current_seed(uint64_t seed) override {
    given = seed;
    numbers.set_current_seed(seed ^ 0x5eedULL);
  }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "a pseudo generator has no offset"); }
  uint64_t get_offset() const override { TORCH_CHECK(false, "a pseudo generator has no offset"); }
  uint64_t current_seed() const override { return given; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return given;
  }
  void set_state(const c10::TensorImpl& state) override { numbers.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return numbers.unsafeGetGeneratorImpl()->get_state(); }
  DeviceGenerator* clone_impl() const override {
    auto* copy = new DeviceGenerator(device().index());
    copy->given = given;
    copy->numbers = numbers.clone();
    return copy;
  }
  uint64_t given = 0;
  at::Generator numbers;
};

const at::Generator& default_generator(int index) {
  static std::array<at::Generator, DEVICES> all = {at::make_generator<DeviceGenerator>(0), at::make_generator<DeviceGenerator>(1)};
  return all[index];
}

at::Generator cpu_generator(const at::Generator& generator, int index) {
  TORCH_CHECK(generator.device().type() == KIND, "Expected a 'pseudo' device type for generator but found '",
      generator.device().type(), "'");
  TORCH_CHECK(generator.device().index() == index, "Expected a generator of device pseudo:", index, " but found one of ",
      generator.device());
  return static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->numbers;
}

// The interfaces that torch asks a device for --------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device device) const override {
    int before = current;
    current = index_of(device);
    return device_of(before);
  }
  c10::Device getDevice() const override { return device_of(current); }
  void setDevice(c10::Device device) const override { current = index_of(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current = device.index();
  }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override { report("wait: an event"); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { report("wait: a stream"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { report("wait: synchronize"); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  void setCurrentDevice(c10::DeviceIndex index) const override { current = index_of(device_of(index)); }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(current); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    int before = current;
    current = index_of(device_of(index));
    return static_cast<c10::DeviceIndex>(before);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  bool isPinnedPtr(const void* memory) const override {
    std::lock_guard<std::mutex> guard(pinned_lock);
    return pinned.count(memory) > 0;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  c10::Device getDeviceFromPtr(void* memory) const override {
    return device_of(reinterpret_cast<Block*>(static_cast<char*>(memory) - HEADER)->index);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    return default_generator(index < 0 ? current : index);
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<DeviceGenerator>(index < 0 ? current : index);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    On on(storage.device().index());
    auto memory = device_memory.allocate(size);
    std::memcpy(memory.get(), storage.data(), std::min(size, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(memory));
    storage.unsafeGetStorageImpl()->set_nbytes(size);
  }
};

// Tensors --------------------------------------------------------------------------------------------------------------

bool is_ours(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == KIND; }

at::Tensor on_cpu(const at::Tensor& tensor) {  // the same memory, as a tensor of the CPU
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  if (tensor.numel() == 0) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  auto alias = at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), [keep = tensor](void*) {}, options);
  if (tensor.is_conj()) alias._set_conj(true);
  if (tensor.is_neg()) alias._set_neg(true);
  return alias;
}

at::Tensor new_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  On on(index_of(device));
  return at::detail::empty_strided_generic(
      size, stride, &device_memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

at::Tensor new_empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  On on(index_of(device));
  return at::detail::empty_generic(
      size, &device_memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

at::Tensor from_cpu(const at::Tensor& tensor, int index) {
  auto made = new_strided(tensor.sizes(), tensor.strides(), tensor.scalar_type(), {}, device_of(index), {});
  if (tensor.numel() > 0) {
    auto size = at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.itemsize());
    std::memcpy(made.data_ptr(), tensor.data_ptr(), size);
  }
  return made;
}

at::Tensor strided_view(
    const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(), self.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  made.unsafeGetTensorImpl()->set_storage_offset(offset.value_or(self.storage_offset()));
  return made;
}

at::Tensor shaped_view(const at::Tensor& self, c10::IntArrayRef size) {
  auto options = at::TensorOptions().dtype(self.dtype());
  auto shaped = (self.numel() == 0 ? at::empty_strided(self.sizes(), self.strides(), options) : on_cpu(self)).view(size);
  return strided_view(self, shaped.sizes(), shaped.strides(), self.storage_offset());
}

const at::Tensor& resized(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  int64_t count = self.storage_offset();
  int64_t entries = 1;
  for (auto length : size) entries *= length;
  auto needed = static_cast<size_t>((count + entries) * self.itemsize());
  if (entries > 0 && needed > self.storage().nbytes()) Hooks().resizePrivateUse1Bytes(self.storage(), needed);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

at::Tensor& set_storage(
    at::Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(storage));
  tensor->set_storage_offset(offset);
  if (stride.empty() && !size.empty()) {
    tensor->set_sizes_contiguous(size);
  } else {
    tensor->set_sizes_and_strides(size, stride);
  }
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  auto count = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  return set_storage(self, std::move(storage), 0, {count}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor copied(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  bool out = is_ours(from), in = is_ours(to);
  // A copy to memory that is not pinned waits whatever is asked for; one from such memory is staged and does not.
  if (out && !in) report(non_blocking && is_pinned(to) ? "download" : "wait: to the host");
  if (!out && in) report(non_blocking ? "upload" : "wait: blocking upload");
  if (out && in && from.device() != to.device()) report("between devices");
  (in ? on_cpu(to) : to).copy_(out ? on_cpu(from) : from);
  return to;
}

at::Tensor copy_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (from.sizes() != to.sizes()) to.resize_(from.sizes());
  return copied(from, to, false);
}

at::Scalar item(const at::Tensor& self) {
  report("wait: item");
  return on_cpu(self).item();
}

bool pinned_tensor(const at::Tensor& self, std::optional<at::Device>) { return is_pinned(self); }

void record_stream(at::Tensor&, at::Stream) {}

bool takes_data_of(const at::Tensor&, const at::Tensor&) { return true; }  // as CUDA and the CPU take each other's

// Operations -----------------------------------------------------------------------------------------------------------

// Those in which CUDA takes a tensor of the CPU without axes for a number: at most one in a call, and never the output.
const std::set<std::string> TAKE_NUMBERS = {"add", "sub", "mul", "div", "floor_divide", "true_divide", "remainder", "fmod",
    "pow", "atan2", "maximum", "minimum", "fmax", "fmin", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or",
    "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_left_shift", "bitwise_right_shift", "hypot",
    "copysign", "nextafter", "xlogy", "gcd", "lcm", "heaviside", "logaddexp", "logaddexp2", "addcmul", "addcdiv", "fill",
    "masked_fill", "index_fill", "_foreach_add", "_foreach_mul", "_foreach_div"};
// Those that copy such tensors to the device, one by one.
const std::set<std::string> COPY_NUMBERS = {"where", "index_put", "_index_put_impl"};
const std::set<std::string> INDEXING = {"index", "index_put", "_index_put_impl", "_unsafe_index", "_unsafe_index_put"};
// Those whose result has a size, or a value for Python, that only the device knows.
const std::set<std::string> WAITING = {"nonzero", "equal", "masked_select", "bincount", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "unique_dim_consecutive", "is_nonzero", "_linalg_check_errors"};

std::string base_name(const std::string& full) {
  auto name = full.substr(full.find("::") + 2);
  while (name.size() > 1 && name.back() == '_' && name != "__") name.pop_back();
  return name;
}

class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack) : op(op), stack(stack), name(base_name(op.schema().name())) {}

  void run() {
    auto count = op.schema().arguments().size();
    std::vector<c10::IValue> arguments(stack->end() - static_cast<int64_t>(count), stack->end());
    for (auto& value : arguments) find_device(value);
    for (size_t i = 0; i < count; i++) {
      draws = op.schema().arguments()[i].name() == "generator";
      arguments[i] = converted(arguments[i]);
    }
    refuse();
    if (ours && WAITING.count(name) > 0) report(("wait: " + name).c_str());
    if (ours && name == "repeat_interleave" && (count < 3 || arguments.back().isNone())) report("wait: repeat_interleave");
    torch::jit::Stack inner(arguments.begin(), arguments.end());
    {
      c10::impl::ExcludeDispatchKeyGuard without_autograd(c10::autograd_dispatch_keyset);
      op.callBoxed(&inner);
    }
    torch::jit::drop(*stack, count);
    for (auto& value : inner) stack->push_back(result(value));
  }

 private:
  void find_device(const c10::IValue& value) {
    if (value.isTensor()) {
      see_device(value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorList()) see_device(tensor);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList()) see_device(tensor.value_or(at::Tensor()));
    } else if (value.isDevice() && value.toDevice().type() == KIND && index < 0) {
      index = index_of(value.toDevice());
    }
    asked |= value.isDevice();
    asked_ours |= value.isDevice() && value.toDevice().type() == KIND;
  }

  void see_device(const at::Tensor& tensor) {
    if (!is_ours(tensor)) return;
    if (ours && tensor.device().index() != index) other = tensor.device();
    if (!ours) index = tensor.device().index();
    ours = true;
  }

  c10::IValue converted(const c10::IValue& value) {
    if (value.isTensor()) return seen(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorList()) list.push_back(seen(tensor));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList()) {
        list.push_back(tensor && tensor->defined() ? std::optional<at::Tensor>(seen_index(*tensor)) : tensor);
      }
      return list;
    }
    if (value.isGenerator() || (value.isNone() && draws)) {
      if (!ours && !asked_ours) return value;
      return cpu_generator(value.isNone() ? default_generator(index) : value.toGenerator(), index);
    }
    if (value.isDevice()) return c10::Device(c10::kCPU);
    return value;
  }

  at::Tensor seen(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (is_ours(tensor)) return aliased(tensor);
    if (!tensor.device().is_cpu()) return tensor;
    if (tensor.dim() > 0) {
      host.push_back(tensor);
    } else {
      numbers++;
    }
    return tensor;
  }

  at::Tensor seen_index(const at::Tensor& tensor) {
    if (is_ours(tensor)) {
      if (tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte) report("wait: a mask as an index");
      index_on_device = true;
      return aliased(tensor);
    }
    if (INDEXING.count(name) == 0) return seen(tensor);
    index_on_host = true;
    return tensor;
  }

  at::Tensor aliased(const at::Tensor& tensor) {
    auto alias = on_cpu(tensor);
    pairs.emplace_back(tensor, alias);
    return alias;
  }

  void refuse() {
    if (!ours) return;
    TORCH_CHECK(!other, "Expected all tensors to be on the same device, but found at least two devices, pseudo:", index, " and ",
        *other, "! (", name, ")");
    bool indexing = INDEXING.count(name) > 0;
    if (indexing && index_on_device) {
      for (const auto& tensor : host) {
        TORCH_CHECK(false, "indices should be either on cpu or on the same device as the indexed tensor (cpu), of shape ",
            tensor.sizes());
      }
      TORCH_CHECK(numbers == 0 || name != "index", "indices should be either on cpu or on the same device as the indexed tensor");
    }
    std::string shapes;
    for (const auto& tensor : host) shapes += c10::str(tensor.sizes());
    TORCH_CHECK(host.empty(), "Expected all tensors to be on the same device, but found at least two devices, pseudo:", index,
        " and cpu! (", name, ", on the CPU ", shapes, ")");
    if (numbers > 0 && COPY_NUMBERS.count(name) > 0) {
      report("wait: blocking upload");
    } else if (numbers > 0) {
      TORCH_CHECK(TAKE_NUMBERS.count(name) > 0 && numbers == 1,
          "Expected all tensors to be on the same device, but found at least two devices, pseudo:", index, " and cpu! (", name,
          ", on the CPU ", numbers, " tensors without axes)");
    }
    if (index_on_host) report("wait: blocking upload");
  }

  c10::IValue result(const c10::IValue& value) {
    if (value.isTensor()) return ours_again(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorList()) list.push_back(ours_again(tensor));
      return list;
    }
    return value;
  }

  at::Tensor ours_again(const at::Tensor& tensor) {
    if (!tensor.defined() || !(asked ? asked_ours : ours)) return tensor;
    for (auto& [mine, alias] : pairs) {
      if (alias.unsafeGetTensorImpl() != tensor.unsafeGetTensorImpl()) continue;
      if (tensor.sizes() != mine.sizes()) {  // an output that was resized
        resized(mine, tensor.sizes(), {});
        on_cpu(mine).copy_(tensor);
      }
      return mine;
    }
    for (auto& [mine, alias] : pairs) {
      if (tensor.numel() > 0 && alias.numel() > 0 && tensor.storage().is_alias_of(alias.storage())) {
        auto bytes = static_cast<const char*>(tensor.data_ptr()) - static_cast<const char*>(alias.data_ptr());
        auto made = strided_view(mine, tensor.sizes(), tensor.strides(),
            (mine.storage_offset() * static_cast<int64_t>(mine.itemsize()) + bytes) / static_cast<int64_t>(tensor.itemsize()));
        if (tensor.dtype() != mine.dtype()) made.unsafeGetTensorImpl()->set_storage_and_dtype(mine.storage(), tensor.dtype());
        if (tensor.is_conj()) made._set_conj(true);
        if (tensor.is_neg()) made._set_neg(true);
        return made;
      }
    }
    return from_cpu(tensor.is_conj() || tensor.is_neg() ? tensor.resolve_conj().resolve_neg() : tensor, index);
  }

  const c10::OperatorHandle& op;
  torch::jit::Stack* stack;
  std::string name;
  int index = -1;  // of the device
  bool ours = false, asked = false, asked_ours = false, index_on_host = false, index_on_device = false;
  std::optional<c10::Device> other;
  std::vector<at::Tensor> host;
  int numbers = 0;
  bool draws = false;  // whether the argument in turn is a generator
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;  // tensors of the device and their aliases
};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Call(op, stack).run(); }

std::optional<at::Tensor> maybe_cpu(const std::optional<at::Tensor>& tensor, const char* name, int index) {
  if (!tensor || !tensor->defined()) return {};
  TORCH_CHECK(is_ours(*tensor) && tensor->device().index() == index,
      "Expected all tensors to be on the same device, but found at least two devices, pseudo:", index, " and ", tensor->device(),
      "! (", name, ")");
  return on_cpu(*tensor);
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed,
    c10::IntArrayRef output_padding, int64_t groups) {
  int index = is_ours(x) ? x.device().index() : weight.device().index();
  auto cpu = [&](const at::Tensor& tensor) { return *maybe_cpu(tensor, "convolution", index); };
  return from_cpu(at::convolution(cpu(x), cpu(weight), maybe_cpu(bias, "convolution", index), stride, padding, dilation,
                      transposed, output_padding, groups)
                      .contiguous(),
      index);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, int64_t rows, int64_t channels, int64_t size, int64_t groups, double eps) {
  int index = is_ours(x) ? x.device().index() : current;
  auto [y, mean, deviation] = at::native_group_norm(maybe_cpu(x, "group_norm", index)->contiguous(),
      maybe_cpu(weight, "group_norm", index), maybe_cpu(bias, "group_norm", index), rows, channels, size, groups, eps);
  return {from_cpu(y, index), from_cpu(mean, index), from_cpu(deviation, index)};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &new_empty);
  m.impl("empty_strided", &new_strided);
  m.impl("as_strided", &strided_view);
  m.impl("view", &shaped_view);
  m.impl("_copy_from", &copied);
  m.impl("_copy_from_and_resize", &copy_and_resize);
  m.impl("_local_scalar_dense", &item);
  m.impl("resize_", &resized);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("is_pinned", &pinned_tensor);
  m.impl("record_stream", &record_stream);
  m.impl("_has_compatible_shallow_copy_type", &takes_data_of);
  m.impl("convolution_overrideable", &convolution);
  m.impl("native_group_norm", &group_norm);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

}  // namespace

namespace at::autocast {
namespace {
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
#undef LOWER
#define SINGLE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  AT_FORALL_FP32(SINGLE)
#undef SINGLE
#define PROMOTED(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_PROMOTE(PROMOTED)
#undef PROMOTED
}
}  // namespace
}  // namespace at::autocast

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("listen", [](py::object f) { listener = f.is_none() ? nullptr : f.release().ptr(); });
  m.def("device_count", [] { return DEVICES; });
  m.def("current_device", [] { return current; });
  m.def("exchange_device", [](int index) {
    int before = current;
    current = index_of(device_of(index));
    return before;
  });
  m.def("limit", [](int index, int64_t bytes) { accounts.at(index).limit = bytes; });
  m.def("held", [](int index) { return accounts.at(index).held.load(); });
  m.def("peak", [](int index) { return accounts.at(index).peak.load(); });
  m.def("reset_peak", [](int index) { accounts.at(index).peak = accounts.at(index).held.load(); });
  m.def("default_generator", [](int index) { return default_generator(index); });
}
