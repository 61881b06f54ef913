// Python bindings of the links between the members of a group. Calls that may wait release the interpreter's lock.
#include "links/links.h"

#include "bindings/bindings.h"
#include "links/tls.h"
#include "runtime/thread_pool.h"

namespace llamaclust {
namespace {

std::string text_of(const nb::bytes& data) { return {data.c_str(), data.size()}; }

std::span<const uint8_t> span_of(const std::string& text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

const char* name_of(Fault fault) {
  switch (fault) {
    case Fault::Late: return "late";
    case Fault::Closed: return "closed";
    case Fault::Unreachable: return "unreachable";
    default: return "wrong";
  }
}

nb::bytes bytes_of(const std::vector<uint8_t>& data) { return nb::bytes(data.data(), data.size()); }

// The Python exception LinkError has the member's place and the kind of fault as attributes.
void bind_error(nb::module_& module) {
  nb::exception<LinkError>(module, "LinkError", PyExc_ConnectionError);
  static PyObject* const type = nb::object(module.attr("LinkError")).release().ptr();
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const LinkError& error) {
      const nb::object raised = nb::handle(type)(error.what());
      raised.attr("place") = error.place;
      raised.attr("kind") = name_of(error.fault);
      PyErr_SetObject(type, raised.ptr());
    }
  });
}

// Takes ownership of the descriptor, also if it throws.
Link open_link(int descriptor, const std::string& peer, const std::optional<TlsSettings>& tls, const nb::bytes& greeting,
               const nb::bytes& expected, double deadline_s) {
  const std::string own = text_of(greeting), theirs = text_of(expected);
  const nb::gil_scoped_release unlocked;
  const int64_t until_ns = now_ns() + static_cast<int64_t>(deadline_s * 1e9);
  const auto channel = [&]() -> std::unique_ptr<Channel> {
    try {
      Socket socket(descriptor);
      if (tls) return open_tls(std::move(socket), *tls, until_ns);
      return std::make_unique<PlainChannel>(std::move(socket));
    } catch (const ConnectionEnded& error) {
      throw LinkError(peer + ": " + error.what(), error.fault, -1);
    }
  };
  return Link(peer, channel(), span_of(own), span_of(theirs), until_ns);
}

}  // namespace

void bind_links(nb::module_& module) {
  bind_error(module);
  module.def("tls_library", &tls_library, "The library of links between machines, and its version; empty where there is none.");
  nb::class_<TlsSettings>(module, "TlsSettings")
      .def(
          "__init__",
          [](TlsSettings* self, const nb::bytes& authority, const nb::bytes& certificate, const nb::bytes& private_key,
             const std::string& host, bool accepts) {
            new (self) TlsSettings{text_of(authority), text_of(certificate), text_of(private_key), host, accepts};
          },
          "authority"_a, "certificate"_a, "private_key"_a, "host"_a, "accepts"_a);
  nb::class_<Link>(module, "Link")
      .def(
          "__init__",
          [](Link* self, int descriptor, const std::string& peer, const std::optional<TlsSettings>& tls,
             const nb::bytes& greeting, const nb::bytes& expected, double deadline_s) {
            new (self) Link(open_link(descriptor, peer, tls, greeting, expected, deadline_s));
          },
          "descriptor"_a, "peer"_a, "tls"_a.none(), "greeting"_a, "expected"_a, "deadline_s"_a)
      .def(
          "greet",
          [](Link& self, const nb::bytes& greeting, const nb::bytes& expected, double deadline_s) {
            const std::string own = text_of(greeting), theirs = text_of(expected);
            const nb::gil_scoped_release unlocked;
            self.greet(span_of(own), span_of(theirs), now_ns() + static_cast<int64_t>(deadline_s * 1e9));
          },
          "greeting"_a, "expected"_a, "deadline_s"_a);
  nb::class_<LinkCounters>(module, "LinkCounters")
      .def_ro("gathers", &LinkCounters::gathers)
      .def_ro("sent_bytes", &LinkCounters::sent_bytes)
      .def_ro("received_bytes", &LinkCounters::received_bytes)
      .def_ro("waited_s", &LinkCounters::waited_s)
      .def_ro("waited_for_s", &LinkCounters::waited_for_s);
  nb::class_<Links, Gatherer>(module, "Links")
      .def(nb::init<int, std::vector<std::shared_ptr<Link>>, double, double>(), "own"_a, "links"_a, "deadline_s"_a,
           "answer_s"_a = 5.0)
      .def("begin", &Links::begin, "epoch"_a, "step"_a, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "send_step",
          [](Links& self, uint64_t epoch, uint64_t step, const nb::bytes& data) {
            const std::span<const uint8_t> bytes{reinterpret_cast<const uint8_t*>(data.c_str()), data.size()};
            const nb::gil_scoped_release unlocked;
            self.send_step(epoch, step, bytes);
          },
          "epoch"_a, "step"_a, "data"_a)
      .def(
          "receive_step",
          [](Links& self, uint64_t epoch, uint64_t step, size_t most_bytes) {
            const auto data = [&] {
              const nb::gil_scoped_release unlocked;
              return self.receive_step(epoch, step, most_bytes);
            }();
            return bytes_of(data);
          },
          "epoch"_a, "step"_a, "most_bytes"_a)
      .def("counters", &Links::counters)
      .def_prop_ro("computing_s", &Links::computing_s)
      .def("close", &Links::close, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace llamaclust
